// Styles of DiceBear that are well told apart when small, all CC BY 4.0 or CC0, in the order of their class ids.
export const CLASSES = [
  "adventurer",
  "big-smile",
  "dylan",
  "fun-emoji",
  "lorelei",
  "micah",
  "miniavs",
  "notionists",
  "open-peeps",
  "personas",
  "pixel-art",
  "thumbs",
  "toon-head",
];
