// Drives the page in headless Chromium, for the test and for screenshots:
//     node drive.mjs URL [--query TEXT] [--picture FILE.png] [--dark] [--width N] [--timeout S]
// types the query, presses Enter, waits for all models, and prints what the page then shows as JSON.
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import puppeteer from "puppeteer-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    query: { type: "string" },
    picture: { type: "string" },
    dark: { type: "boolean", default: false },
    width: { type: "string", default: "1280" },
    timeout: { type: "string", default: "60" },
  },
});
const timeout = 1000 * Number(values.timeout);
const profile = mkdtempSync(join(tmpdir(), "browser-search-"));
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM,
  userDataDir: profile,
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
  timeout,
  protocolTimeout: timeout,
});
try {
  const page = await browser.newPage();
  const problems = [];
  const outside = [];
  const origin = new URL(positionals[0]).origin;
  page.on("pageerror", (error) => problems.push(String(error)));
  await page.setViewport({ width: Number(values.width), height: 900, deviceScaleFactor: 1.5 });
  if (values.dark) await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
  page.on("request", (request) => {
    if (!request.url().startsWith(origin) && request.url().startsWith("http")) outside.push(request.url());
  });
  const address = new URL(positionals[0]);
  await page.goto(address.href, { timeout });
  // Started: every model runs or has said why not; or the page itself has.
  await page.waitForFunction(
    () => document.body.dataset.started || !document.getElementById("trouble").hidden,
    { timeout },
  );
  const works = await page.$eval("#go", (button) => !button.disabled);
  if (values.query && works) {
    await page.focus("#query");
    await page.keyboard.type(values.query);
    await page.keyboard.press("Enter");
    await page.waitForFunction((text) => document.body.dataset.answered === text, { timeout }, values.query);
  }
  if (values.picture) await page.screenshot({ path: values.picture, fullPage: true });
  const shown = await page.evaluate(() => {
    const text = (from, selector) => from.querySelector(selector)?.textContent.trim() ?? "";
    return {
      status: text(document, "#status"),
      trouble: document.getElementById("trouble").hidden ? "" : text(document, "#trouble"),
      machine: text(document, "#machine"),
      isolated: self.crossOriginIsolated,
      models: Object.fromEntries(
        [...document.querySelectorAll(".card")].map((card) => [
          card.id,
          {
            name: text(card, "h2"),
            size: text(card, ".megabytes"),
            state: card.dataset.state,
            says: text(card, ".state"),
            load: text(card, '[data-figure="load"]'),
            query: text(card, '[data-figure="query"]'),
            shared: text(card, ".shared"),
            nearest: [...card.querySelectorAll("li")].map((item) => ({
              sentence: Number(item.dataset.sentence),
              text: item.querySelector("p").firstChild.textContent,
              similarity: Number(text(item, ".score")),
            })),
          },
        ]),
      ),
    };
  });
  console.log(JSON.stringify({ ...shown, problems, outside }));
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
