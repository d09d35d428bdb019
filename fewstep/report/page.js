"use strict";
(() => {
  const slider = document.getElementById("moment");
  const key = "fewstep-moment:" + document.title;
  if (slider) {
    const moments = slider.dataset.moments.split(",").map(Number);
    const grids = [...document.querySelectorAll(".frames")].map((box) => [...box.querySelectorAll("img")]);
    const play = document.getElementById("play");
    let timer = null;

    const show = () => {
      const moment = moments[Number(slider.value)];
      document.getElementById("at").textContent = moment;
      slider.setAttribute("aria-valuetext", "iteration " + moment);
      for (const images of grids) {
        // A run's last grid until then; its first where there is none yet.
        const before = images.filter((image) => Number(image.dataset.iteration) <= moment);
        const now = before.length ? before[before.length - 1] : images[0];
        for (const image of images) image.hidden = image !== now;
      }
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
    };
    const step = () => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === moments.length - 1) stop();
    };
    slider.addEventListener("input", () => { stop(); show(); });
    play.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (Number(slider.value) === moments.length - 1) slider.value = 0;
      show();
      timer = setInterval(step, 700);
      play.textContent = "Stop";
      play.setAttribute("aria-pressed", "true");
    });

    const kept = sessionStorage.getItem(key);
    if (document.body.dataset.refresh && kept !== null && kept !== "last") {
      slider.value = Math.max(0, moments.indexOf(Number(kept)));
      show();
    }
    addEventListener("pagehide", () => {
      const last = Number(slider.value) === moments.length - 1;
      sessionStorage.setItem(key, last ? "last" : moments[Number(slider.value)]);
    });
  }

  const seconds = Number(document.body.dataset.refresh || 0);
  if (seconds) setTimeout(() => location.reload(), 1000 * seconds);
})();
