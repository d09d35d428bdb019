"""Pictures measured by a protocol's name, and references to hold them against."""

from fewstep.measuring.measure import measure
from fewstep.measuring.pictures import BATCH
from fewstep.measuring.records import FILE, append, table
from fewstep.measuring.references import make_reference
from fewstep.measuring.request import Request

__all__ = ["BATCH", "FILE", "Request", "append", "make_reference", "measure", "table"]
