// Writes web/page/vendor/: one minified module, and the licences of everything that is in it.
import { readFileSync, writeFileSync, existsSync, readdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import path from "node:path";
import { build } from "esbuild";

const here = path.dirname(fileURLToPath(import.meta.url));
const out = path.join(here, "page", "vendor");

const result = await build({
  entryPoints: [path.join(here, "entry.js")],
  outfile: path.join(out, "markdown.js"),
  absWorkingDir: here,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2020",
  charset: "utf8",
  legalComments: "none", // NOTICE has them in full
  metafile: true,
});

const packages = new Set();
for (const input of Object.keys(result.metafile.inputs)) {
  const match = input.match(/^node_modules\/((?:@[^/]+\/)?[^/]+)\//);
  if (match) packages.add(match[1]);
}

const notices = [...packages].sort().map((name) => {
  const folder = path.join(here, "node_modules", name);
  const { version, license } = JSON.parse(readFileSync(path.join(folder, "package.json"), "utf8"));
  const files = readdirSync(folder).filter((file) => /^licen[cs]e/i.test(file)).sort();
  if (!files.length || !existsSync(folder)) throw new Error(`${name} has no licence file`);
  const texts = files.map((file) => readFileSync(path.join(folder, file), "utf8").trim());
  return `${"=".repeat(80)}\n${name} ${version} (${license})\n${"=".repeat(80)}\n\n${texts.join("\n\n")}\n`;
});
const head = "markdown.js is built by web/build.mjs from these packages, unchanged. Their licences:\n\n";
writeFileSync(path.join(out, "NOTICE"), head + notices.join("\n"));
console.log(`${[...packages].sort().join(", ")}: ${Math.round(result.metafile.outputs[Object.keys(result.metafile.outputs)[0]].bytes / 1024)} KiB`);
