"use strict";

const form = document.querySelector("form");
const [photo, beams, token, preview, caption, others, candidates, timing] =
  ["photo", "beams", "token", "preview", "caption", "others", "candidates", "timing"]
    .map((id) => document.getElementById(id));
const button = form.querySelector("button");

function show(result) {
  caption.textContent = result.caption ?? result.error;
  if (!result.caption) return;
  preview.alt = result.caption;
  candidates.replaceChildren(...result.candidates.map(({ caption, score }) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = caption;
    row.insertCell().textContent = score.toFixed(2);
    return row;
  }));
  const ms = Object.values(result.ms).reduce((sum, part) => sum + part, 0);
  timing.textContent = `${Math.round(ms)} ms (${result.engine})`;
  others.hidden = false;
}

photo.addEventListener("change", () => {
  URL.revokeObjectURL(preview.src);
  preview.hidden = !photo.files.length;
  preview.alt = "The chosen photo";
  if (photo.files.length) preview.src = URL.createObjectURL(photo.files[0]);
  caption.textContent = "";
  others.hidden = true;
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  button.disabled = true;
  others.hidden = true;
  caption.textContent = "Looking at the photo…";
  try {
    const response = await fetch(`v1/caption${beams.value && `?num_beams=${beams.value}`}`, {
      method: "POST",
      body: new FormData(form),
      headers: token.value ? { Authorization: `Bearer ${token.value}` } : {},
    });
    show(await response.json());
  } catch (error) {
    caption.textContent = `The service did not answer: ${error.message}`;
  } finally {
    button.disabled = false;
  }
});
