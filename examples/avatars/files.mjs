import { renameSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";

/** Write a file that is under its name only when it is whole; no loader reads the hidden one of an interruption. */
export function writeWhole(path, content) {
  const hidden = join(dirname(path), `.unfinished-${basename(path)}`);
  writeFileSync(hidden, content);
  renameSync(hidden, path);
}
