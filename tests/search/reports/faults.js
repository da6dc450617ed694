// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
// Returns what is wrong with a page as it is laid out, one sentence each.
() => {
  const LEAST_CONTRAST = 4.5, LEAST_TEXT = 9, FIRST_SCREEN = 800;
  const faults = new Set();
  const style = (element) => getComputedStyle(element);
  const scrolls = (element) =>
    element && (["auto", "scroll"].includes(style(element).overflowX) || scrolls(element.parentElement));
  const channels = (color) => color.match(/[\d.]+/g).map(Number);
  const luminance = (color) => {
    const [red, green, blue] = channels(color).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const background = (element) => {
    if (!element) return "rgb(255, 255, 255)";
    const color = style(element).backgroundColor;
    return channels(color)[3] === 0 ? background(element.parentElement) : color;
  };
  const contrast = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };

  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) faults.add(`the page is ${width} px wide, and the window ${innerWidth} px`);
  const isDark = luminance(background(document.body)) < 0.2;
  if (isDark !== matchMedia("(prefers-color-scheme: dark)").matches) faults.add("the color scheme is not followed");
  const head = document.querySelector("header");
  if (!head || !head.querySelector("h1")) faults.add("there is no header with a heading");
  else if (innerWidth >= 1280 && head.getBoundingClientRect().bottom > FIRST_SCREEN)
    faults.add("the choice and its price are not in the first screen");

  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, said = texts.currentNode.data.trim().slice(0, 40);
    const range = document.createRange();
    range.selectNodeContents(texts.currentNode);
    const box = range.getBoundingClientRect();
    if (!said || !box.width) continue;
    if (!scrolls(element) && (box.left < 0 || box.right > innerWidth + 1)) faults.add(`off the screen: ${said}`);
    const plot = element.closest("svg");
    let size = parseFloat(style(element).fontSize), color = style(element).color;
    if (plot) {
      const frame = plot.getBoundingClientRect();
      const beyond = [frame.left - box.left, frame.top - box.top, box.right - frame.right, box.bottom - frame.bottom];
      if (Math.max(...beyond) > 1) faults.add(`cut off in a plot: ${said}`);
      const { a, b } = element.getScreenCTM();
      size *= Math.hypot(a, b);
      color = style(element).fill;
    }
    if (size < LEAST_TEXT) faults.add(`text of ${size.toFixed(1)} px: ${said}`);
    const found = contrast(color, background(element));
    if (found < LEAST_CONTRAST) faults.add(`contrast of ${found.toFixed(1)}: ${said}`);
  }
  return [...faults];
}
