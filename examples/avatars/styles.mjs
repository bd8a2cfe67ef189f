// What image number k of a style shows: a function of its style and number alone.

import { createHash } from "node:crypto";

import * as collection from "@dicebear/collection";
import { createAvatar } from "@dicebear/core";

import { CLASSES } from "./classes.mjs";

const STYLES = Object.fromEntries(CLASSES.map((name) => [name, collection[camelCase(name)]]));
const BACKGROUNDS = ["#b6e3f4", "#c0aede", "#f4a6c0", "#a8dcc0", "#fbe790", "#d8dce3", "#7d9fd0", "#b5c58b"];

const VALIDATION_SHARE = 10; // one drawing in so many

/** The drawing of a seed, without background. */
export function drawAvatar(style, seed) {
  // The clipping mask of DiceBear costs two thirds of the rendering, and the edge of the image clips as well.
  return createAvatar(STYLES[style], { seed, backgroundColor: [], clip: false });
}

/**
 * The first images of a style in each split: `{split: [{seed, background, attributes}, ...]}`.
 *
 * The drawing decides the split, not the seed: styles with few options draw the same avatar for many seeds.
 */
export function planStyle(style, counts) {
  const plan = { train: [], validation: [] };
  for (let number = 0; plan.train.length < counts.train || plan.validation.length < counts.validation; number++) {
    const digest = createHash("sha256").update(`${style} ${number}`).digest();
    const seed = digest.toString("hex", 0, 8);
    const avatar = drawAvatar(style, seed);
    const split = splitOf(avatar.toString());
    if (plan[split].length < counts[split]) {
      const background = BACKGROUNDS[digest[8] % BACKGROUNDS.length];
      plan[split].push({ seed, background, attributes: attributesOf(style, avatar.toJson().extra) });
    }
  }
  return plan;
}

function splitOf(svg) {
  const hash = createHash("sha256").update(svg).digest().readUInt32BE();
  return hash % VALIDATION_SHARE === 0 ? "validation" : "train";
}

/** The options DiceBear chose, without those that have a single value and colours of absent parts. */
function attributesOf(style, options) {
  const choices = STYLES[style].schema.properties;
  const varies = (name) => `${name}Probability` in choices || valuesOf(choices[name]).length > 1;
  const isDrawn = (name) => {
    const part = name.replace(/Color$/, "");
    const parts = [part, `${part}s`].filter((candidate) => candidate in choices); // micah: earrings, earringColor
    return parts.every((candidate) => options[candidate] !== undefined);
  };
  const names = Object.keys(options).filter((name) => varies(name) && isDrawn(name));
  return Object.fromEntries(names.map((name) => [name, options[name]]).filter(([, value]) => value !== undefined));
}

function valuesOf(choice) {
  return choice?.items?.enum ?? choice?.default ?? [];
}

function camelCase(name) {
  return name.replace(/-./g, (hyphenated) => hyphenated[1].toUpperCase());
}
