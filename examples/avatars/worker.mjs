// One of the threads that plan styles and render images; see pool.mjs.

import { parentPort } from "node:worker_threads";

import { Resvg } from "@resvg/resvg-js";

import { writeWhole } from "./files.mjs";
import { encodePng } from "./png.mjs";
import { drawAvatar, planStyle } from "./styles.mjs";

const TASKS = {
  plan: ({ style, counts }) => planStyle(style, counts),
  render: ({ images, size, transparent }) => images.forEach((image) => renderFile(image, size, transparent)),
};

parentPort.on("message", ({ kind, ...task }) => parentPort.postMessage(TASKS[kind](task)));

function renderFile({ path, style, seed, background }, size, transparent) {
  const rendered = new Resvg(drawAvatar(style, seed).toString(), {
    fitTo: { mode: "width", value: size },
    font: { loadSystemFonts: false },
    ...(transparent ? {} : { background }),
  }).render();
  writeWhole(path, encodePng(rendered.pixels, size, transparent));
}
