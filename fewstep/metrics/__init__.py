"""Metrics: images or features in, numbers out. Nothing here trains a network and nothing here knows a teacher."""
