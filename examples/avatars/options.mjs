import { availableParallelism } from "node:os";
import { parseArgs } from "node:util";

export class UsageError extends Error {}

const NUMBERS = {
  images_per_style: { default: 2000, least: 1, most: 1_000_000 },
  validation_images_per_style: { default: 100, least: 0, most: 1_000_000 },
  size: { default: 256, least: 1, most: 4096 },
  processes: { default: availableParallelism(), least: 1, most: 1024 },
};

export const HELP = `Render a data set of avatars in 13 styles, its classes.

node render.mjs --output FOLDER [options]

  --output FOLDER                    where the images go; an interrupted run goes on where it stopped, more images are added
  --images_per_style N               training images of each style (${NUMBERS.images_per_style.default})
  --validation_images_per_style N    validation images of each style (${NUMBERS.validation_images_per_style.default})
  --size N                           width and height in pixels (${NUMBERS.size.default})
  --transparent                      RGBA without background instead of RGB on a flat colour
  --processes N                      how many render at a time (the number of CPUs, here ${NUMBERS.processes.default})
  --help                             this text`;

/** The options that were given and the defaults of the others; `{help: true}` if that was asked for. */
export function parseOptions(args) {
  const types = { output: "string", transparent: "boolean", help: "boolean" };
  Object.keys(NUMBERS).forEach((name) => (types[name] = "string"));
  const options = Object.fromEntries(Object.entries(types).map(([name, type]) => [name, { type }]));
  const { values, positionals } = parseArgs({ args, options, strict: false });
  for (const [name, value] of Object.entries(values)) {
    checkOption(name, value, types);
  }
  if (positionals.length > 0) {
    throw new UsageError(`'${positionals[0]}' belongs to no option; give it after one, as in --output avatars`);
  }
  if (values.help) {
    return values;
  }
  if (!values.output) {
    throw new UsageError(`--output '${values.output ?? ""}' names no folder; give one, such as --output avatars`);
  }
  const numbers = Object.keys(NUMBERS).map((name) => [name, parseNumber(name, values[name])]);
  return { ...values, transparent: values.transparent ?? false, ...Object.fromEntries(numbers) };
}

function checkOption(name, value, types) {
  if (!(name in types)) {
    const known = Object.keys(types).map((option) => `--${option}`);
    throw new UsageError(`--${name} is not an option; give one of ${known.join(", ")}`);
  }
  if (typeof value !== types[name]) {
    const remedy = types[name] === "boolean" ? "leave the value out" : "give one after it";
    throw new UsageError(`--${name} has ${value === true ? "no value" : `the value '${value}'`}; ${remedy}`);
  }
}

function parseNumber(name, text) {
  const limits = NUMBERS[name];
  if (text === undefined) {
    return limits.default;
  }
  const value = Number(text);
  if (!/^\d+$/.test(text) || value < limits.least || value > limits.most) {
    throw new UsageError(`--${name} '${text}' must be a whole number from ${limits.least} to ${limits.most}`);
  }
  return value;
}
