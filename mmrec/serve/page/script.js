// The page at `/`: a form becomes one POST of v1/match, the answer becomes cards.
// Whatever comes from the service is inserted as text or as an attribute, never as HTML.
// Addresses are relative, so that the page also works behind a proxy's path.

const NUM_EAGER_IMAGES = 8;
const MAX_ATTRIBUTES = 6;
const KINDS = [
  [/^(u?int|float|double|halffloat|decimal)/, "number"],
  [/^bool/, "yes/no"],
  [/^(date|timestamp|time)/, "date"],
  [/list/, "list"],
  [/(string|utf8|dictionary)/, "text"],
];
const OWN = new Set(["product_id", "content_id", "title"]);
// Words that a condition cannot use as a name unless they are quoted.
const RESERVED = new Set(
  `all analyse analyze and any array as asc both case cast check collate column constraint create default
  desc distinct do else end except false fetch for from grant group having in intersect into lateral
  leading limit not null offset on only or order placing primary qualify references returning select
  some table then to trailing true union unique using variadic when where window with`.split(/\s+/),
);

const $ = (id) => document.getElementById(id);
const fields = { token: $("token"), files: $("files"), text: $("text"), where: $("where"), k: $("k") };

let info = { columns: [], limits: {} };
let chosen = []; // Files of the query, in the order of choice.
let token = sessionStorage.getItem("mmrec token") ?? "";
let running = null; // The XMLHttpRequest under way.
let answered = null; // What the form was last answered, to come back to from "More like this".
let lastAsked = null; // The question under way, or else the last.

// Elements

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

function say(words) {
  // A live region is read when it changes: the same words twice need a change between them.
  $("spoken").textContent = "";
  setTimeout(() => ($("spoken").textContent = words), 30);
}

function count(number, noun, plural = noun + "s") {
  return `${number.toLocaleString("en")} ${number === 1 ? noun : plural}`;
}

function bytes(number) {
  if (number < 1 << 20) return `${Math.max(1, Math.round(number / 1024))} kB`;
  return `${(number / 2 ** 20).toFixed(number < 10 << 20 ? 1 : 0)} MB`;
}

// Errors, each at the field that it is about

function complain(place, words) {
  $(`${place}-error`).textContent = words;
  fields[place]?.setAttribute("aria-invalid", "true");
  if (place === "token") $("token-field").hidden = false;
  fields[place]?.focus();
  say(words);
}

function clearErrors() {
  for (const error of document.querySelectorAll(".error")) error.textContent = "";
  for (const field of Object.values(fields)) field.removeAttribute("aria-invalid");
}

function placeOf(status, error) {
  const named = { video: "files", images: "files", text: "text", where: "where", k: "k" }[error.field];
  if (named) return named;
  return status === 413 || status === 415 ? "files" : "form";
}

function sentence({ reason, field }, status) {
  if (!reason) return `The service answered with status ${status}.`;
  let words = reason;
  // What stands at the field need not name it, nor the columns that are listed below it.
  if (field === "where") {
    words = words.replace(/^where ('|").*\1: (\w+ Error: )?/s, "").replace(/; columns: .*$/s, "");
    words = words.replace(/^Referenced column (".*") not found in FROM clause!$/, "There is no column $1");
  } else if (field === "images") {
    words = words.replace(/^images\[(\d+)\]: /, (_, place) => `${lastAsked.files[place]?.name}: `);
  } else if (field && words.startsWith(`${field}: `)) words = words.slice(field.length + 2);
  words = words.charAt(0).toUpperCase() + words.slice(1);
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

function explain(answer) {
  const error = answer.body?.error ?? {};
  if (answer.status === 401) {
    return complain("token", token ? "The service does not take this token." : "Enter the token to go on.");
  }
  if (answer.status === 0) return complain("form", "The service cannot be reached. Is it still running?");
  let words = sentence(error, answer.status);
  if (answer.retryAfter) words += ` Try again in ${count(Number(answer.retryAfter), "second")}.`;
  complain(placeOf(answer.status, error), words);
}

// Requests. XMLHttpRequest, since fetch does not tell how much of an upload has been sent.

function send(method, path, { form = null, onSent = () => {}, onStart = () => {} } = {}) {
  return new Promise((resolve) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    request.responseType = "json";
    if (token) request.setRequestHeader("Authorization", `Bearer ${token}`);
    request.upload.onprogress = (event) => onSent(event.loaded / event.total);
    request.onabort = () => resolve({ status: null });
    request.onerror = () => resolve({ status: 0 });
    request.onload = () =>
      resolve({
        status: request.status,
        body: request.response,
        retryAfter: request.getResponseHeader("Retry-After"),
      });
    onStart(request);
    request.send(form);
  });
}

async function loadInfo() {
  const answer = await send("GET", "v1/info");
  if (answer.status !== 200) return explain(answer);
  info = answer.body;
  $("token-field").hidden = true;
  showInfo();
}

function showInfo() {
  const { columns, limits } = info;
  $("facts").textContent = facts(info).join(" · ");
  fields.k.max = limits.max_k;
  $("files-hint").textContent =
    `One video, or up to ${limits.max_images} pictures of the same thing; ${bytes(limits.max_bytes)} in all.`;
  fields.where.placeholder = exampleCondition(columns);
  $("columns").replaceChildren(...columns.map(columnButton));
  $("where-hint").hidden = columns.length > 0;
}

function facts({ index, encoder }) {
  return [count(index.products, "product"), `encoder ${encoder.towers}`, `index ${index.generation}`];
}

// The filter

function kindOf(type) {
  return KINDS.find(([pattern]) => pattern.test(type))?.[1] ?? type;
}

function quoted(name) {
  const plain = /^[a-z_][a-z0-9_]*$/i.test(name) && !RESERVED.has(name.toLowerCase());
  return plain ? name : `"${name.replaceAll('"', '""')}"`;
}

function exampleCondition(columns) {
  const first = (kind) => columns.find(({ type }) => kindOf(type) === kind)?.name;
  const parts = [];
  if (first("number")) parts.push(`${quoted(first("number"))} < 30`);
  if (first("yes/no")) parts.push(quoted(first("yes/no")));
  const words = columns.find(({ name, type }) => kindOf(type) === "text" && !OWN.has(name))?.name;
  if (words && parts.length < 2) parts.push(`${quoted(words)} = '…'`);
  return parts.join(" and ");
}

function columnButton({ name, type }, place) {
  const button = make("button", { type: "button", tabIndex: place ? -1 : 0 }, name, " ");
  button.append(make("span", {}, kindOf(type)));
  button.addEventListener("click", () => insertColumn(quoted(name)));
  return button;
}

function insertColumn(name) {
  const field = fields.where;
  const before = field.value.slice(0, field.selectionStart);
  const space = before && !/[\s(]$/.test(before) ? " " : "";
  field.setRangeText(`${space}${name} `, field.selectionStart, field.selectionEnd, "end");
  field.focus();
}

// One stop for Tab however many columns there are; arrows go from one to the next.
function moveAmongColumns(event) {
  const buttons = [...$("columns").children];
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const now = buttons.indexOf(document.activeElement);
  if (now < 0 || !(event.key in steps)) return;
  event.preventDefault();
  const next = buttons[(now + steps[event.key] + buttons.length) % buttons.length];
  buttons[now].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// Files

function isPicture(file) {
  // A GIF on its own is a clip.
  return file.type.startsWith("image/") && file.type !== "image/gif";
}

function choose(files) {
  clearErrors();
  const added = [...files];
  if (!added.length) return;
  const together = [...chosen, ...added];
  // A new video takes the place of what was there; pictures join pictures.
  const next = together.every((file) => file.type.startsWith("image/")) ? together : added;
  const wrong = wrongFiles(next);
  if (wrong) return complain("files", wrong);
  chosen = next;
  showChosen();
  say(`Chosen: ${chosen.map((file) => file.name).join(", ")}`);
}

function wrongFiles(files) {
  const { max_bytes: maxBytes = Infinity, max_images: maxImages = Infinity } = info.limits;
  const videos = files.filter((file) => !file.type.startsWith("image/"));
  const size = files.reduce((sum, file) => sum + file.size, 0);
  const empty = files.find((file) => file.size === 0);
  if (empty) return `${empty.name} is empty.`;
  if (videos.length && files.length > 1) return "One video, or pictures: not several videos, nor both.";
  if (files.length > maxImages) return `${files.length} pictures; the service takes up to ${maxImages}.`;
  if (size > maxBytes) return `${bytes(size)} is too large; the service takes up to ${bytes(maxBytes)}.`;
  return null;
}

function showChosen() {
  $("chosen").replaceChildren(...chosen.map(chosenItem));
  fields.files.parentElement.classList.toggle("has-files", chosen.length > 0);
}

function chosenItem(file, place) {
  const remove = make("button", { type: "button", "aria-label": `Remove ${file.name}` }, "×");
  remove.addEventListener("click", () => {
    chosen = chosen.toSpliced(place, 1);
    showChosen();
    clearErrors();
    ($("chosen").querySelectorAll("button")[place] ?? fields.files).focus();
  });
  const name = make("span", { className: "name", title: file.name }, file.name);
  name.append(make("small", {}, bytes(file.size)));
  return make("li", {}, thumbnail(file), name, remove);
}

function thumbnail(file) {
  if (!isPicture(file)) return make("span", { className: "thumb film", "aria-hidden": "true" });
  const canvas = make("canvas", { className: "thumb", width: 72, height: 72, "aria-hidden": "true" });
  // Drawn, not linked: so the page's policy needs no blob: addresses.
  createImageBitmap(file, { resizeWidth: 72, resizeHeight: 72, resizeQuality: "medium" })
    .then((bitmap) => canvas.getContext("2d").drawImage(bitmap, 0, 0))
    .catch(() => {}); // What the browser cannot draw, the service may still read.
  return canvas;
}

// Asking

function formData(question) {
  const form = new FormData();
  if (question.like) form.append(info.index?.key ?? "product_id", question.like.product_id);
  const asVideo = question.files.length === 1 && !isPicture(question.files[0]);
  for (const file of question.files) form.append(asVideo ? "video" : "images", file);
  if (question.text) form.append("text", question.text);
  if (question.where) form.append("where", question.where);
  form.append("k", question.k);
  form.append("why", String(!question.like));
  form.append("frames", String(question.files.length > 0));
  return form;
}

function readForm() {
  return {
    files: chosen,
    text: fields.text.value.trim(),
    where: fields.where.value.trim(),
    k: fields.k.value,
    like: null,
  };
}

function wrongForm({ files, text, k }) {
  if (!files.length && !text) return ["form", "Choose a video or pictures, or type a title."];
  const most = Number(fields.k.max);
  if (!/^\d+$/.test(k) || k < 1 || k > most) return ["k", `A whole number from 1 to ${most}.`];
  return null;
}

async function ask(question) {
  clearErrors();
  running?.abort();
  lastAsked = question;
  const started = performance.now();
  const mine = { request: null };
  const answer = await send("POST", "v1/match", {
    form: formData(question),
    onSent: (share) => showProgress(question.files.length ? share : 1),
    onStart: (request) => {
      running = mine.request = request;
      showProgress(question.files.length ? 0 : 1);
    },
  });
  if (running !== mine.request) return; // A later question has taken over.
  running = null;
  hideProgress();
  if (answer.status === null) return say("Cancelled.");
  if (answer.status !== 200) return explain(answer);
  const result = { question, answer: answer.body, total_ms: performance.now() - started };
  if (!question.like) answered = result;
  show(result);
}

function showProgress(share) {
  const sending = share < 1;
  $("progress").hidden = false;
  $("results").setAttribute("aria-busy", "true");
  $("find").hidden = true;
  $("cancel").hidden = false;
  // A key that started the search must find the button that ends it.
  if (document.activeElement === document.body) $("cancel").focus();
  if (sending) $("bar").value = share;
  else $("bar").removeAttribute("value");
  const stage = sending ? `Sending, ${Math.round(100 * share)}%` : "Matching";
  if ($("stage").textContent !== stage) $("stage").textContent = stage;
  $("bar").setAttribute("aria-label", sending ? "Sending" : "Matching");
}

function hideProgress() {
  const focused = document.activeElement === $("cancel");
  $("progress").hidden = true;
  $("results").setAttribute("aria-busy", "false");
  $("find").hidden = false;
  $("cancel").hidden = true;
  if (focused) $("find").focus();
}

function cancel() {
  running?.abort();
}

// The answer

function show({ question, answer, total_ms: total }) {
  const { matches } = answer;
  $("results-heading").textContent = heading(question, matches);
  $("timing").textContent = timing(answer.timing_ms, total);
  $("back").hidden = !(question.like && answered);
  $("asked").replaceChildren(...asked(question, answer.query));
  const frames = answer.query.frames ?? [];
  const cards = matches.map((match) => card(match, frames));
  const body = cards.length ? make("ol", { className: "cards" }, ...cards) : nothing(question);
  $("matches").replaceChildren(body);
  say(spoken(question, matches));
  // On a narrow screen the answer lies below the form.
  if (matchMedia("(max-width: 820px)").matches) $("results").scrollIntoView();
}

function heading({ like }, matches) {
  const found = count(matches.length, "match", "matches");
  return like ? `${found} like “${like.title || like.product_id}”` : found;
}

function timing(stages, total) {
  const parts = Object.entries(stages)
    .filter(([, ms]) => ms >= 0.05) // A stage that there was.
    .map(([stage, ms]) => `${stage} ${milliseconds(ms)}`);
  return [...parts, `${milliseconds(total)} ms in all`].join(" · ");
}

function milliseconds(ms) {
  return ms < 9.95 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en");
}

function spoken(question, matches) {
  if (!matches.length) return "No matches.";
  const [first] = matches;
  return `${heading(question, matches)}. First: ${first.title || first.product_id}, score ${score(first.score)}.`;
}

function score(value) {
  return value.toFixed(3).replace("-", "−");
}

function nothing({ where }) {
  return make("p", { className: "start" }, where ? "No product meets the filter." : "Nothing was found.");
}

function asked({ text, where, like }, query) {
  const parts = [];
  if (query.frames?.length) {
    const items = query.frames.map((frame, place) =>
      make("li", {}, make("img", { src: frame, alt: `Frame ${place + 1} of ${query.frames.length}` })),
    );
    const label = "Frames of the query, in the order of time";
    // It scrolls sideways, so it takes the focus: or the keyboard could not.
    parts.push(make("ol", { className: "frames", tabIndex: 0, role: "list", "aria-label": label }, ...items));
  }
  if (like?.image) {
    const picture = make("img", { className: "asked-product", alt: like.title || like.product_id });
    loadPicture(picture, like.image);
    parts.push(picture);
  }
  const words = make("p", { className: "words" });
  if (text) words.append(make("q", {}, text));
  if (where) words.append(text ? " where " : "Where ", make("code", {}, where));
  if (words.hasChildNodes()) parts.push(words);
  return parts;
}

function card(match, frames) {
  const title = match.title || match.product_id;
  const place = make("p", { className: "place" });
  const points = make("span", {}, make("span", { className: "unseen" }, "score "), score(match.score));
  place.append(make("span", {}, make("span", { className: "unseen" }, "place "), String(match.place)), points);
  const name = { "aria-label": `More like this: ${title}` };
  const like = make("button", { type: "button", className: "like", ...name }, "More like this");
  like.addEventListener("click", () => askLike(match));
  return make(
    "li",
    { className: "card" },
    photo(match, title),
    place,
    make("h3", { title }, title),
    attributes(match),
    hasReasons(match.why) ? why(match.why, frames) : null,
    make("p", { className: "foot" }, like),
  );
}

function photo({ image, place }, title) {
  if (!image) return make("div", { className: "photo none" }, "no picture");
  const picture = make("img", { alt: title, decoding: "async", width: 224, height: 224 });
  picture.loading = place > NUM_EAGER_IMAGES ? "lazy" : "eager";
  loadPicture(picture, image);
  picture.addEventListener("error", () =>
    picture.parentElement?.replaceWith(make("div", { className: "photo none" }, "no picture")),
  );
  return make("div", { className: "photo" }, picture);
}

function attributes({ attributes: own, product_id: id }) {
  const rows = Object.entries(own).filter(([, value]) => value !== null && shown(value) !== "");
  const list = make("dl", { className: "attributes" });
  for (const [name, value] of [...rows.slice(0, MAX_ATTRIBUTES), ["id", id]]) {
    list.append(make("div", {}, make("dt", {}, name), make("dd", {}, shown(value))));
  }
  return list;
}

function shown(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return value.toLocaleString("en", { maximumFractionDigits: 4 });
  if (Array.isArray(value)) return value.map(shown).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// Why: what the score loses without each frame, and what video and title reach alone

// Of words alone, or of one picture alone, there is nothing to tell apart.
function hasReasons(reasons) {
  if (!reasons) return false;
  const { video_alone: video, title_alone: title, frame_losses: losses } = reasons;
  return losses.length > 1 || (video !== null && title !== null);
}

function why(reasons, frames) {
  const losses = reasons.frame_losses;
  const details = make("details", { className: "why" }, make("summary", {}, `Why: ${inShort(reasons)}`));
  details.addEventListener("toggle", () => {
    if (!details.open || details.childElementCount > 1) return;
    if (losses.length > 1 && losses.length === frames.length) details.append(lossBars(losses, frames));
    details.append(make("p", {}, atLength(reasons)));
  });
  return details;
}

function inShort({ title_alone: title, title_share: share, frame_losses: losses }) {
  const parts = [];
  const best = bestFrame(losses);
  if (title !== null && share === null) parts.push("either half does");
  else if (title !== null) parts.push(share > 0.5 ? `title ${percent(share)}` : `video ${percent(1 - share)}`);
  if (best >= 0) parts.push(`frame ${best + 1}`);
  else if (title === null) parts.push("no single frame");
  return parts.join(", ");
}

function atLength({ video_alone: video, title_alone: title, frame_losses: losses }) {
  const words = [];
  const best = bestFrame(losses);
  if (best >= 0) words.push(`Without frame ${best + 1} the score falls by ${score(losses[best])}.`);
  else if (losses.length > 1) words.push("No frame is missed if it alone is left out.");
  if (title !== null) words.push(`Video alone ${score(video)}, title alone ${score(title)}.`);
  return words.join(" ");
}

function bestFrame(losses) {
  const most = Math.max(...losses);
  return losses.length > 1 && most > 0 ? losses.indexOf(most) : -1;
}

function lossBars(losses, frames) {
  const largest = Math.max(...losses.map(Math.abs)) || 1;
  const items = losses.map((loss, place) => {
    const bar = (side, value) => {
      const span = make("span", { className: side, "aria-hidden": "true" });
      span.style.setProperty("--share", Math.max(0, value / largest));
      return span;
    };
    const words = make("span", { className: "unseen" }, `frame ${place + 1}: ${signed(loss)}`);
    const picture = make("img", { src: frames[place], alt: "" });
    return make("li", { title: `frame ${place + 1}: ${signed(loss)}` }, bar("adds", loss), picture, bar("takes", -loss), words);
  });
  return make("ol", { role: "list", "aria-label": "What each frame adds to the score" }, ...items);
}

function percent(share) {
  return `${Math.round(100 * share)}%`;
}

function signed(value) {
  return (value > 0 ? "+" : "") + score(value);
}

async function askLike(product) {
  await ask({ ...readForm(), files: [], text: "", like: product });
  if (lastAsked.like === product && !running) $("results-heading").focus();
}

// Pictures. An <img> cannot carry a token, so with one they are fetched when they come into view.

function loadPicture(picture, address) {
  const relative = address.replace(/^\//, "");
  if (!token) {
    picture.src = relative;
    return;
  }
  picture.dataset.address = relative;
  seen.observe(picture);
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      fetchPicture(target);
    }
  },
  { rootMargin: "400px" },
);

async function fetchPicture(picture) {
  const answer = await fetch(picture.dataset.address, { headers: { Authorization: `Bearer ${token}` } });
  if (!answer.ok) return picture.dispatchEvent(new Event("error"));
  const reader = new FileReader();
  reader.onload = () => (picture.src = reader.result);
  reader.readAsDataURL(await answer.blob());
}

// The address: words and filter alone, so that a search can be sent to somebody

function writeAddress({ text, where }) {
  const state = new URLSearchParams();
  if (text) state.set("text", text);
  if (where) state.set("where", where);
  const hash = state.size ? `#${state}` : "";
  if (hash !== location.hash) history.pushState(null, "", hash || location.pathname + location.search);
}

function readAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  fields.text.value = state.get("text") ?? "";
  fields.where.value = state.get("where") ?? "";
  if (fields.text.value) submit();
}

// Events

function submit() {
  const question = readForm();
  const wrong = wrongForm(question);
  clearErrors();
  if (wrong) return complain(...wrong);
  writeAddress(question);
  ask(question);
}

async function takeToken() {
  clearErrors();
  token = fields.token.value.trim();
  sessionStorage.setItem("mmrec token", token);
  await loadInfo();
  if (!$("token-field").hidden) return;
  if (chosen.length || fields.text.value) submit();
  else fields.files.focus();
}

function listen() {
  $("query").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("token-field").hidden) submit();
    else takeToken();
  });
  $("query").addEventListener("reset", () => {
    cancel();
    chosen = [];
    showChosen();
    clearErrors();
    fields.files.focus();
  });
  $("cancel").addEventListener("click", cancel);
  $("back").addEventListener("click", () => {
    cancel();
    clearErrors();
    show(answered);
    $("results-heading").focus();
  });
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // The address holds the query, not a place on the page.
    $("results-heading").focus();
  });
  $("columns").addEventListener("keydown", moveAmongColumns);
  fields.files.addEventListener("change", () => {
    choose(fields.files.files);
    fields.files.value = ""; // Or the same file, chosen again after its removal, would be no change.
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) cancel();
  });
  addEventListener("popstate", readAddress);
  listenToDrops();
}

function listenToDrops() {
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  const mark = (on) => document.body.classList.toggle("dragging", on);
  // Anywhere on the page: a file dropped beside the zone would otherwise replace the page.
  document.addEventListener("dragover", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || mark(false));
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!holdsFiles(event)) return;
    event.preventDefault();
    choose(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) choose(event.clipboardData.files);
  });
}

async function start() {
  listen();
  await loadInfo();
  readAddress();
}

start();
