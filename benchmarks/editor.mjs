// What an editor shows of a config, offline: completion, hover and diagnostics of VS Code's JSON language service.
//
//     npm install vscode-json-languageservice && node benchmarks/editor.mjs
//
// Exits with 1 where something is missing; prints a row for each thing that was tried.
import { readFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL, fileURLToPath } from "node:url";

const require = createRequire(resolve(process.cwd(), "package.json"));
const { getLanguageService, TextDocument } = require("vscode-json-languageservice");
const root = process.argv[2] ?? resolve(dirname(fileURLToPath(import.meta.url)), "..");
const file = resolve(root, "generated_configs/llama.json");
const asked = [];
const service = getLanguageService({
  schemaRequestService: async (uri) => { asked.push(uri); return readFileSync(fileURLToPath(uri), "utf-8"); },
  workspaceContext: { resolveRelativePath: (path, from) => new URL(path, from).href },
});
const original = readFileSync(file, "utf-8");
let failed = 0;

function opened(text) {
  const document = TextDocument.create(pathToFileURL(file).href, "json", 1, text);
  return [document, service.parseJSONDocument(document)];
}
function row(name, found, wanted) {
  const ok = wanted(found);
  failed += ok ? 0 : 1;
  console.log(`| ${name} | ${ok ? "yes" : "NO"} | ${String(found).replace(/\s+/g, " ").slice(0, 140)} |`);
}
async function completion(name, before, text, wanted) {
  const at = text.indexOf(before) + before.length;
  const [document, json] = opened(text);
  const found = (await service.doComplete(document, document.positionAt(at), json))?.items.map((item) => item.label) ?? [];
  row(name, found.join(", "), () => wanted.every((word) => found.includes(word)));
}
async function hover(name, word, wanted) {
  const [document, json] = opened(original);
  const found = await service.doHover(document, document.positionAt(original.indexOf(word) + 2), json);
  row(name, JSON.stringify(found?.contents ?? null), (text) => text.includes(wanted));
}
async function diagnostics(name, old, now, wanted) {
  const [document, json] = opened(original.replace(old, now));
  const found = (await service.doValidation(document, json)).map((one) => `${one.range.start.line + 1}: ${one.message}`);
  row(name, found.join("; ") || "nothing", (text) => text.includes(wanted));
}

console.log("| tried | works | what is shown |\n|---|---|---|");
await diagnostics("a committed config", "", "", "nothing");
await completion("completes a strategy", '"strategy": ', original.replace(/"strategy": "[^"]*"/, '"strategy": '), ['"w_int8_per_channel_a_int8_per_token_dynamic"', '"w_int8_per_tensor_a_int8_per_tensor_static"']);
await completion("completes a method", '"method": ', original.replace('"method": "smoothquant"', '"method": '), ['"smoothquant"', '"descent"']);
await completion("completes keys of a section", '"weights": {', original.replace(/"weights": \{[^}]*\}/, '"weights": {}'), ["clip", "rounding"]);
await completion("completes keys of a line of knobs", '"alpha": null, ', original.replace('"alpha": null, "method": null', '"alpha": null, '), ["method"]);
await completion("completes keys of an override", '"overrides": [{', original.replace('"overrides": []', '"overrides": [{}]'), ["layers", "enable", "alpha", "method"]);
await hover("says what alpha is", '"alpha"', "Share of the difficulty");
await hover("says what a group's kind is", '"kind": "norm_linear"', "norm weight into linears");
await hover("says what the claims are", '"claims"', "What was found of the model");
await diagnostics("a misspelt key", '"alpha": 0.5', '"alhpa": 0.5', "alhpa");
await diagnostics("a value out of range", '"alpha": 0.5', '"alpha": 1.5', "maximum");
await diagnostics("a strategy that there is not", "per_token_dynamic", "per_tokn_dynamic", "31:");
await diagnostics("a knob among the claims", '"kind": "norm_linear"', '"alpha": 0.7, "kind": "norm_linear"', "alpha");
await diagnostics("a key that is missing", '"channels": 4096,', "", "channels");
row("asks for the schema beside it and nothing else", [...new Set(asked)].join(" ").replaceAll(pathToFileURL(root).href, "file:///…"), (text) => /^file:\S+autoquant-config\.v2\.schema\.json$/.test(text));
process.exit(failed ? 1 : 0);
