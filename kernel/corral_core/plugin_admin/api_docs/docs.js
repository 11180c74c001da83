// The API document as a page. Everything comes from openapi.json; text is only ever set as text, never as markup.
"use strict";

const METHODS = ["get", "post", "put", "patch", "delete"];
const byId = (id) => document.getElementById(id);
let api;

/** An element with a class and children (strings become text). */
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** Paragraphs, with `code` in backquotes. */
function prose(text) {
  const inline = (part) => part.split("`").map((piece, i) => (i % 2 ? make("code", "", piece) : piece));
  return (text || "").split(/\n\s*\n/).filter(Boolean).map((part) => make("p", "", ...inline(part)));
}

/** The thing a `$ref` leads to, with what stands beside the reference. */
function resolve(thing) {
  if (!thing || !thing.$ref) return thing || {};
  const { $ref, ...beside } = thing;
  const steps = $ref.slice(2).split("/").map((step) => step.replace(/~1/g, "/").replace(/~0/g, "~"));
  return { ...resolve(steps.reduce((node, step) => node && node[step], api)), ...beside };
}

const refName = (schema) => (schema.$ref ? schema.$ref.split("/").pop() : "");
const alternatives = (schema) => schema.anyOf || schema.oneOf || [];

/** A type in words: `string (uuid)`, `list of Tool`, `Tool or null`. */
function typeOf(given) {
  if (given.$ref && resolve(given).type === "object") return refName(given);
  const schema = resolve(given);
  if (schema.allOf) return schema.allOf.map(typeOf).filter((word) => word !== "anything").join(" and ");
  if (alternatives(schema).length) return alternatives(schema).map(typeOf).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return "one of " + schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.type === "array") return "list of " + typeOf(schema.items || {});
  if (schema.type === "object" && schema.additionalProperties && schema.additionalProperties !== true)
    return "map of " + typeOf(schema.additionalProperties);
  const type = Array.isArray(schema.type) ? schema.type.join(" or ") : schema.type;
  return type ? type + (schema.format ? ` (${schema.format})` : "") : "anything";
}

/** The bounds of a value in words. */
function bounds(given) {
  const schema = resolve(given);
  const found = [];
  const range = (low, high, unit) => {
    if (low !== undefined && high !== undefined) found.push(`${low} to ${high}${unit}`);
    else if (low !== undefined) found.push(`at least ${low}${unit}`);
    else if (high !== undefined) found.push(`at most ${high}${unit}`);
  };
  range(schema.minLength, schema.maxLength, " characters");
  range(schema.minimum, schema.maximum, "");
  range(schema.minItems, schema.maxItems, " items");
  if (schema.exclusiveMinimum !== undefined) found.push(`more than ${schema.exclusiveMinimum}`);
  if (schema.exclusiveMaximum !== undefined) found.push(`less than ${schema.exclusiveMaximum}`);
  if (schema.default !== undefined) found.push(`default ${JSON.stringify(schema.default)}`);
  for (const part of alternatives(schema)) found.push(...bounds(part));
  return [...new Set(found)];
}

/** The object schemas inside a type, with their names. */
function objects(given) {
  const schema = resolve(given);
  if (schema.properties) return [[refName(given) || schema.title || "object", schema]];
  const inner = [...alternatives(schema), ...(schema.allOf || [])];
  if (schema.items) inner.push(schema.items);
  if (schema.additionalProperties && typeof schema.additionalProperties === "object") inner.push(schema.additionalProperties);
  return inner.flatMap(objects);
}

/** The fields of each object in a schema; nested objects open on demand, so recursive shapes are fine. */
function fields(given) {
  const parts = objects(given);
  return parts.map(([name, schema]) => {
    const box = make("div", "schema", parts.length > 1 ? make("div", "soft", name) : "");
    for (const [key, value] of Object.entries(schema.properties)) {
      const must = (schema.required || []).includes(key);
      const label = make("code", "", key);
      const line = [make("span", must ? "must" : "", label), " ", make("span", "soft", [typeOf(value), ...bounds(value)].join(", "))];
      const words = resolve(value).description && !value.$ref ? prose(value.description) : [];
      box.append(make("div", "field", objects(value).length ? lazy(line, () => fields(value)) : make("div", "", ...line), ...words));
    }
    if (!Object.keys(schema.properties).length) box.append(make("span", "soft", "no fields"));
    return box;
  });
}

/** A `details` whose content is made when it is first opened. */
function lazy(summary, content, className) {
  const node = make("details", className, make("summary", "", ...summary));
  node.addEventListener("toggle", () => {
    if (node.open && node.childElementCount === 1) node.append(...content());
  });
  return node;
}

function table(heads, rows) {
  const row = (cells, tag) => make("tr", "", ...cells.map((cell) => make(tag, "", ...[cell].flat())));
  return make("table", "", make("thead", "", row(heads, "th")), make("tbody", "", ...rows.map((cells) => row(cells, "td"))));
}

function section(title, ...content) {
  return [make("h3", "", title), ...content];
}

function parameters(operation) {
  const rows = (operation.parameters || []).map(resolve).map((each) => [
    make("span", each.required ? "must" : "", make("code", "", each.name)),
    each.in,
    [make("span", "soft", [typeOf(each.schema), ...bounds(each.schema)].join(", ")), ...prose(each.description)],
  ]);
  return rows.length ? section("Parameters", table(["Name", "In", "What"], rows)) : [];
}

function body(operation) {
  const given = resolve(operation.requestBody);
  return Object.entries(given.content || {}).flatMap(([media, { schema }]) =>
    section("Body", make("div", "soft", `${media}, ${given.required ? "required" : "may be absent"}: `, make("code", "", typeOf(schema))), ...fields(schema), ...prose(given.description)),
  );
}

/** Codes of a problem response, or the fields of a success. */
function answer(response) {
  const found = [];
  for (const [media, { schema }] of Object.entries(response.content || {})) {
    const codes = (schema && schema.allOf ? schema.allOf : []).flatMap((part) => (part.properties && part.properties.code ? part.properties.code.enum : []));
    if (codes.length) found.push(make("div", "codes", ...codes.map((code) => make("code", "", code))));
    else {
      const line = [make("code", "", typeOf(schema || {})), make("span", "soft", ` ${media}`)];
      found.push(schema && objects(schema).length ? lazy(line, () => fields(schema)) : make("div", "", ...line));
    }
  }
  return found;
}

function responses(operation) {
  const rows = Object.entries(operation.responses).map(([status, given]) => {
    const response = resolve(given);
    const headers = Object.keys(response.headers || {}).join(", ");
    const good = Number(status) < 400;
    return [status, [...(good ? prose(response.description) : []), ...answer(response), good && headers ? make("div", "soft", `Headers: ${headers}`) : ""]];
  });
  const problem = api.components.schemas.Problem && { $ref: "#/components/schemas/Problem" };
  return section("Answers", table(["Status", "What"], rows), problem ? lazy(["The problem document"], () => fields(problem)) : "");
}

/** A value that fits a schema, for the example. */
function sample(given, depth = 0) {
  const schema = resolve(given);
  if (schema.default !== undefined) return schema.default;
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  if (alternatives(schema).length) return sample(alternatives(schema)[0], depth);
  if (schema.type === "array") return schema.minItems && depth < 4 ? [sample(schema.items || {}, depth + 1)] : [];
  if (schema.type === "integer" || schema.type === "number") return schema.minimum || 0;
  if (schema.type === "boolean") return false;
  if (schema.type === "string") return schema.format === "uuid" ? "00000000-0000-7000-8000-000000000000" : schema.format === "date-time" ? "2026-01-31T12:00:00Z" : "…";
  const names = depth < 4 ? schema.required || [] : [];
  return Object.fromEntries(names.map((name) => [name, sample(schema.properties[name], depth + 1)]));
}

function curl(method, path, operation) {
  const server = new URL(api.servers && api.servers[0] ? api.servers[0].url : "/", location.origin).href.replace(/\/$/, "");
  const wanted = (operation.parameters || []).map(resolve).filter((each) => each.in === "query" && each.required);
  const query = wanted.map((each) => `${each.name}=${encodeURIComponent(sample(each.schema))}`).join("&");
  const lines = [`curl -X ${method.toUpperCase()} '${server}${path}${query ? `?${query}` : ""}'`];
  if ((operation.security || []).length) lines.push(`-H "Authorization: Bearer $TOKEN"`);
  const json = (resolve(operation.requestBody).content || {})["application/json"];
  if (json) {
    const text = JSON.stringify(sample(json.schema), null, 2).replace(/'/g, "'\\''");
    lines.push("-H 'Content-Type: application/json'", `-d '${text}'`);
  }
  return lines.join(" \\\n  ");
}

function example(method, path, operation) {
  const text = curl(method, path, operation);
  const button = make("button", "", "Copy");
  const code = make("code", "", text);
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {  // no clipboard without HTTPS: select the text instead
      getSelection().selectAllChildren(code);
      button.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  const title = make("h3", "", "Example");
  return [make("div", "row", title, button), make("pre", "", code)];
}

function operationBox(method, path, operation) {
  const summary = [make("span", `method ${method}`, method.toUpperCase()), make("span", "path", path), make("span", "words", operation.summary || "")];
  const content = () => [
    make("div", "inside", ...prose(operation.description), ...parameters(operation), ...body(operation), ...responses(operation), ...example(method, path, operation)),
  ];
  const node = lazy(summary, content, "operation");
  node.id = operation.operationId;
  node.addEventListener("toggle", () => node.open && history.replaceState(null, "", `${location.pathname}#${node.id}`));
  const text = [method, path, operation.summary, operation.description, operation.operationId, ...(operation.tags || [])].join(" ");
  node.words = text.toLowerCase();
  return node;
}

/** The operations by tag, in the order of the document's tags. */
function grouped() {
  const groups = new Map((api.tags || []).map((tag) => [tag.name, []]));
  for (const [path, item] of Object.entries(api.paths)) {
    for (const method of METHODS.filter((name) => item[name])) {
      const tag = (item[method].tags || ["Other"])[0];
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operationBox(method, path, item[method]));
    }
  }
  return groups;
}

function draw() {
  byId("title").textContent = document.title = api.info.title;
  byId("version").textContent = api.info.version;
  byId("description").append(...prose(api.info.description));
  for (const [tag, boxes] of grouped()) {
    const title = make("h2", "", tag);
    title.id = `tag-${tag}`;
    title.tabIndex = -1;
    byId("operations").append(make("section", "", title, ...boxes));
    const link = make("a", "", tag, make("span", "soft", String(boxes.length)));
    link.href = `${location.pathname}#${encodeURIComponent(title.id)}`;
    byId("tags").append(make("li", "", link));
  }
}

/** Show the operations that contain every word of the filter. */
function filter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const part of byId("operations").children) {
    const boxes = [...part.querySelectorAll(".operation")];
    for (const box of boxes) box.hidden = !words.every((word) => box.words.includes(word));
    const left = boxes.filter((box) => !box.hidden).length;
    part.hidden = !left;
    shown += left;
  }
  byId("status").textContent = shown === 1 ? "1 operation" : `${shown} operations`;
}

function openAddressed() {
  const node = byId(decodeURIComponent(location.hash.slice(1)));
  if (!node) return;
  if (node.matches(".operation")) node.open = true;
  node.scrollIntoView();
}

async function start() {
  try {
    const response = await fetch(document.body.dataset.document);
    if (!response.ok) throw new Error(`status ${response.status}`);
    api = await response.json();
  } catch (error) {
    byId("status").textContent = `The document could not be loaded: ${error.message}. Reload the page to try again.`;
    return;
  }
  draw();
  filter();
  openAddressed();
  byId("filter").addEventListener("input", filter);
  addEventListener("hashchange", openAddressed);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.matches("input")) {
      event.preventDefault();
      byId("filter").focus();
    }
    if (event.key === "Escape" && event.target === byId("filter")) {
      byId("filter").value = "";
      filter();
    }
  });
}

start();
