// Renders a data set of avatars: `node render.mjs --output FOLDER`, `--help` for the options.

import { existsSync, mkdirSync, readFileSync, readdirSync, statSync } from "node:fs";
import { join } from "node:path";

import { CLASSES } from "./classes.mjs";
import { writeWhole } from "./files.mjs";
import { HELP, UsageError, parseOptions } from "./options.mjs";
import { Pool } from "./pool.mjs";

const SETTINGS_FILE = "settings.json";
const COUNTS = ["images_per_style", "validation_images_per_style"]; // images do not depend on them
const IMAGES_A_TASK = 32;
const SECONDS_BETWEEN_LINES = process.stderr.isTTY ? 1 : 10;

async function main() {
  const options = parseOptions(process.argv.slice(2));
  if (options.help) {
    console.log(HELP);
    return;
  }
  if (!existsSync(new URL("./node_modules", import.meta.url))) {
    throw new UsageError("node_modules is not beside render.mjs; install it with: npm ci --prefix examples/avatars");
  }
  openFolder(options);
  const pool = new Pool(options.processes);
  try {
    const images = await planImages(pool, options);
    await renderMissing(pool, images, options);
    writeMetadata(images, options);
  } finally {
    await pool.close();
  }
}

// --------------------------------------------------------------------------------------------------------------------
// The folder and what it was made with
// --------------------------------------------------------------------------------------------------------------------

/** Create the folder, or check that an earlier run did, with the same settings and no more images. */
function openFolder(options) {
  const file = join(options.output, SETTINGS_FILE);
  const settings = settingsOf(options);
  if (existsSync(file)) {
    checkSettings(JSON.parse(readFileSync(file, "utf8")), settings, options.output);
  } else {
    checkEmpty(options.output);
    mkdirSync(options.output, { recursive: true });
  }
  writeWhole(file, JSON.stringify(settings, null, 2) + "\n");
}

function checkEmpty(output) {
  if (existsSync(output) && !statSync(output).isDirectory()) {
    throw new UsageError(`--output '${output}' is a file; give a folder`);
  }
  if (existsSync(output) && readdirSync(output).some((name) => !name.startsWith("."))) {
    throw new UsageError(`--output '${output}' holds other files; give a new or empty folder`);
  }
}

/** Everything that the images depend on. */
function settingsOf({ images_per_style, validation_images_per_style, size, transparent }) {
  const manifest = JSON.parse(readFileSync(new URL("./package.json", import.meta.url), "utf8"));
  return { images_per_style, validation_images_per_style, size, transparent, ...manifest.dependencies };
}

function checkSettings(found, asked, output) {
  const isFit = (key) => (COUNTS.includes(key) ? found[key] <= asked[key] : found[key] === asked[key]);
  const name = Object.keys(asked).find((key) => !isFit(key));
  if (name !== undefined) {
    const option = name.startsWith("@") ? name : `--${name}`;
    throw new UsageError(
      `--output '${output}' was made with ${option} ${found[name]}, not ${asked[name]}; ` +
        "give another folder, or the same settings, or more images, to go on with this one",
    );
  }
}

// --------------------------------------------------------------------------------------------------------------------
// Images
// --------------------------------------------------------------------------------------------------------------------

/** All images of the data set, of one style after the other. */
async function planImages(pool, options) {
  const counts = { train: options.images_per_style, validation: options.validation_images_per_style };
  const plans = await pool.run(CLASSES.map((style) => ({ kind: "plan", style, counts })));
  return CLASSES.flatMap((style, index) =>
    Object.entries(plans[index]).flatMap(([split, images]) =>
      images.map((image, number) => {
        const name = `${style}/${String(number).padStart(5, "0")}.png`;
        return { ...image, style, split, name, path: join(options.output, split, name) };
      }),
    ),
  );
}

async function renderMissing(pool, images, { output, size, transparent }) {
  const folders = new Set(images.map((image) => join(output, image.split, image.style)));
  const present = new Set();
  for (const folder of folders) {
    mkdirSync(folder, { recursive: true });
    readdirSync(folder).forEach((name) => present.add(join(folder, name)));
  }
  const missing = images.filter((image) => !present.has(image.path));
  const tasks = [];
  for (let start = 0; start < missing.length; start += IMAGES_A_TASK) {
    tasks.push({ kind: "render", images: missing.slice(start, start + IMAGES_A_TASK), size, transparent });
  }
  const progress = new Progress(missing.length);
  await pool.run(tasks, (task) => progress.add(task.images.length));
  progress.end(`${count(images.length - missing.length)} of ${count(images.length)} images were there before`);
}

/** `metadata.jsonl` of each split, as the `imagefolder` loader of Datasets reads it. */
function writeMetadata(images, { output, transparent }) {
  for (const split of new Set(images.map((image) => image.split))) {
    const rows = images
      .filter((image) => image.split === split)
      .map(({ name, style, seed, background, attributes }) => ({
        file_name: name,
        label: style,
        seed,
        background: transparent ? "transparent" : background,
        // As text: the styles have different options, and a data set has one set of columns.
        attributes: JSON.stringify(attributes),
      }));
    writeWhole(join(output, split, "metadata.jsonl"), rows.map((row) => JSON.stringify(row) + "\n").join(""));
  }
}

// --------------------------------------------------------------------------------------------------------------------
// Progress
// --------------------------------------------------------------------------------------------------------------------

class Progress {
  constructor(total) {
    Object.assign(this, { total, done: 0, start: Date.now(), shown: Date.now() });
  }

  add(images) {
    this.done += images;
    const now = Date.now();
    if (now - this.shown >= 1000 * SECONDS_BETWEEN_LINES) {
      this.shown = now;
      const left = Math.ceil((this.total - this.done) / this.rate());
      this.write(`${count(this.done)} of ${count(this.total)} images, ${count(this.rate())}/s, ${left} s left`);
    }
  }

  rate() {
    return this.done / Math.max((Date.now() - this.start) / 1000, 0.001);
  }

  write(line) {
    process.stderr.write(process.stderr.isTTY ? `\r${line.padEnd(70)}` : `${line}\n`);
  }

  end(remark) {
    const seconds = ((Date.now() - this.start) / 1000).toFixed(1);
    this.write(`rendered ${count(this.done)} images in ${seconds} s (${count(this.rate())}/s); ${remark}`);
    process.stderr.write(process.stderr.isTTY ? "\n" : "");
  }
}

function count(number) {
  return Math.round(number).toLocaleString("en");
}

try {
  await main();
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = error instanceof UsageError ? 2 : 1;
}
