"use strict";
// The page of `facefed serve`.  It speaks to its own server only; the token stays in this tab.

const $ = (selector, within = document) => within.querySelector(selector);
const slots = new Map(); // of pictures: name -> File[]
let about = null; // what /api/model says

// -- the server -------------------------------------------------------------------------------------------------------

function token() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname); // not in the history, nor over somebody's shoulder
  }
  return sessionStorage.getItem("token") || "";
}

async function ask(path, question) {
  const options = { headers: { authorization: `Bearer ${token()}` } };
  if (question !== undefined) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(question);
    if (about && options.body.length > about.limits.body_bytes)
      throw new Error("The pictures are too large together; send fewer or smaller ones.");
  }
  let response;
  try {
    response = await fetch(`/api/${path}`, options);
  } catch {
    throw new Error("The server does not answer; is facefed serve still running?");
  }
  const answer = await response.json().catch(() => null); // a proxy's error page, or an answer that was broken off
  if (response.ok && answer !== null) return answer;
  const said = answer !== null && typeof answer.error === "string" ? capital(answer.error) : "";
  const told = said || `The server answered ${response.status}, without a word that can be read; try again.`;
  if (response.status === 401) {
    sessionStorage.removeItem("token");
    showLogin(told);
  }
  throw new Error(told);
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

async function encoded(file) {
  if (about && file.size > about.limits.picture_bytes) {
    const most = Math.floor(about.limits.picture_bytes / 2 ** 20);
    throw new Error(`${file.name} is larger than ${most} MiB; give a smaller picture.`);
  }
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
  return url.slice(url.indexOf(",") + 1);
}

// -- building ---------------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "path", "line", "text", "circle", "rect"]);

function make(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const notice = (text, kind = "") => make("p", { class: `notice ${kind}`, role: kind === "bad" ? "alert" : null }, text);

async function answering(place, button, work) {
  place.replaceChildren(make("p", { class: "busy" }, "Looking ..."));
  button.disabled = true;
  try {
    place.replaceChildren(...(await work()));
  } catch (error) {
    place.replaceChildren(notice(error.message, "bad"));
  } finally {
    refresh();
  }
}

// -- choosing pictures ------------------------------------------------------------------------------------------------

const WORDS = { first: "First photograph", second: "Second photograph", who: "Photograph", many: "Photographs" };

function setUpDrop(place) {
  const name = place.dataset.slot, many = "many" in place.dataset;
  const input = make("input", {
    type: "file", accept: "image/*", id: `file-${name}`, multiple: many, "aria-label": WORDS[name],
  });
  const pick = make("label", { class: "pick", for: input.id });
  const ways = make("div", { class: "ways" }, input, pick,
    make("button", { type: "button", onclick: () => photograph(take) }, "Use the camera"));

  function take(files) {
    const pictures = [...files];
    if (!pictures.length) return;
    slots.set(name, many ? [...slots.get(name), ...pictures] : pictures.slice(0, 1));
    draw();
  }
  function preview(file, number) {
    const url = URL.createObjectURL(file);
    const picture = make("img", { src: url, alt: file.name, onload: () => URL.revokeObjectURL(url) });
    picture.addEventListener("error", () => picture.replaceWith(make("span", { class: "quiet" }, file.name)));
    const away = () => {
      slots.set(name, slots.get(name).filter((_, other) => other !== number));
      draw();
      input.focus();
    };
    const button = make("button", { type: "button", "aria-label": `Take ${file.name} away`, onclick: away }, "×");
    return make("figure", {}, picture, button);
  }
  function draw() {
    const files = slots.get(name);
    place.classList.toggle("full", files.length > 0);
    pick.textContent = !files.length ? "Choose a file" : many ? "Add more" : "Choose another";
    const empty = [make("strong", {}, WORDS[name]), make("p", { class: "hint" }, "Drop or paste here, or")];
    const shown = make("div", { class: many ? "previews many" : "previews" }, ...files.map(preview));
    place.replaceChildren(...(files.length ? [shown] : empty), ways);
    input.value = "";
    refresh();
  }
  input.addEventListener("change", () => take(input.files));
  for (const kind of ["dragenter", "dragover"])
    place.addEventListener(kind, (event) => { event.preventDefault(); place.classList.add("over"); });
  for (const kind of ["dragleave", "drop"]) place.addEventListener(kind, () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => { event.preventDefault(); take(event.dataTransfer.files); });
  place.take = take;
  place.clear = () => { slots.set(name, []); draw(); };
  place.clear();
}

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  const places = [...document.querySelectorAll("[role=tabpanel]:not([hidden]) .drop")];
  const place = places.find((one) => !slots.get(one.dataset.slot).length) || places[0];
  if (files.length && place) place.take(files);
});

async function photograph(take) {
  const dialog = $("#camera"), video = $("video", dialog), error = $(".error", dialog);
  let stream = null, isOpen = true;
  error.textContent = "";
  const close = () => {
    isOpen = false;
    if (stream) stream.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    if (dialog.open) dialog.close();
  };
  dialog.oncancel = close;
  $("#camera-close").onclick = close;
  $("#camera-take").onclick = () => {
    if (!video.videoWidth) return;
    const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => { take([new File([blob], "camera.png", { type: "image/png" })]); close(); }, "image/png");
  };
  dialog.showModal();
  try {
    const given = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user", width: { ideal: 1280 } } });
    if (isOpen) video.srcObject = stream = given;
    else given.getTracks().forEach((track) => track.stop());
  } catch {
    error.textContent = isSecureContext
      ? "No camera can be used: there is none, or it is not allowed."
      : "Browsers give the camera to localhost and to https only; start facefed serve with --tls.";
  }
}

function refresh() {
  const has = (name) => (slots.get(name) || []).length > 0;
  $("#verify-go").disabled = !(has("first") && has("second"));
  $("#verify-clear").hidden = !(has("first") || has("second"));
  $("#identify-go").disabled = !has("who");
  $("#enrol-go").disabled = !has("many");
}

// -- answers ----------------------------------------------------------------------------------------------------------

// The genuine and impostor scores of the model's validation people, each as a share of its own kind.
function chart(score, threshold) {
  const width = innerWidth < 640 ? 360 : 720, height = 200, top = 40, bottom = 165; // so that words keep their size
  const rows = about.histogram.map((row) => {
    const sum = row.reduce((one, other) => one + other, 0) || 1;
    return row.map((count) => count / sum);
  });
  const [genuine, impostor] = rows, bins = genuine.length, at = (bin) => -1 + (2 * bin) / bins;
  const used = genuine.map((value, bin) => value + impostor[bin] > 0);
  const marks = score === null ? [threshold] : [threshold, score];
  const low = Math.max(-1, Math.min(at(used.indexOf(true)), ...marks) - 0.05);
  const high = Math.min(1, Math.max(at(used.lastIndexOf(true) + 1), ...marks) + 0.05);
  const x = (cosine) => 8 + ((Math.max(low, Math.min(high, cosine)) - low) / (high - low)) * (width - 16);
  const most = Math.max(...genuine, ...impostor), y = (value) => bottom - (value / most) * (bottom - top);
  const area = (row, colour) => {
    const steps = row.map((value, bin) => `L${x(at(bin))},${y(value)}L${x(at(bin + 1))},${y(value)}`).join("");
    return make("path", {
      d: `M${x(-1)},${bottom}${steps}L${x(1)},${bottom}Z`, fill: colour, "fill-opacity": 0.35, stroke: colour,
      "stroke-width": 1.5,
    });
  };
  const anchor = (place) => (place < 90 ? "start" : place > width - 90 ? "end" : "middle");
  const words = `Scores of the validation pairs; threshold ${threshold.toFixed(3)}`;
  const svg = make("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": score === null ? words : `${words}; this pair ${score.toFixed(3)}`,
  }, area(impostor, "var(--impostor)"), area(genuine, "var(--genuine)"),
  make("line", { x1: 8, x2: width - 8, y1: bottom, y2: bottom, stroke: "var(--line)" }),
  make("line", {
    x1: x(threshold), x2: x(threshold), y1: top - 12, y2: bottom, stroke: "var(--soft)", "stroke-dasharray": "4 4",
    "stroke-width": 1.5,
  }),
  make("text", { x: x(threshold), y: bottom + 20, "text-anchor": anchor(x(threshold)) },
    `threshold ${threshold.toFixed(3)}`));
  if (score !== null)
    svg.append(
      make("line", { x1: x(score), x2: x(score), y1: top - 12, y2: bottom, stroke: "var(--ink)", "stroke-width": 2.5 }),
      make("circle", { cx: x(score), cy: top - 12, r: 4.5, fill: "var(--ink)" }),
      make("text", { class: "mark", x: x(score), y: top - 24, "text-anchor": anchor(x(score)) },
        `this pair ${score.toFixed(3)}`));
  const legend = make("ul", { class: "legend" },
    make("li", {}, make("i", { class: "g" }), "pairs of one person"),
    make("li", {}, make("i", { class: "i" }), "pairs of two people"));
  return make("div", { class: "chart" }, svg, legend);
}

const faults = (faces) => faces.map((face, number) => {
  const several = face.num_faces > 1 ? `${face.num_faces} faces, of which the largest counts` : "";
  const said = [several, face.faults].filter(Boolean).join("; ");
  return said ? notice(`${["First", "Second"][number]} photograph: ${said}.`) : null;
}).filter(Boolean);

$("#verify-go").onclick = () => answering($("#verify-answer"), $("#verify-go"), async () => {
  const [first, second] = await Promise.all(["first", "second"].map((name) => encoded(slots.get(name)[0])));
  const found = await ask("verify", { first, second });
  const face = (one, words) => make("img", { src: one.picture, alt: `${words} face, aligned` });
  const says = `Score ${found.score.toFixed(3)} is ${found.same ? "at or above" : "below"} the threshold`
    + ` ${found.threshold.toFixed(3)}.`;
  const pair = make("div", { class: "pair" }, face(found.faces[0], "First"),
    make("span", { class: "sign", "aria-hidden": "true" }, found.same ? "=" : "≠"), face(found.faces[1], "Second"));
  const badge = make("span", { class: `badge ${found.same ? "yes" : "no"}` },
    found.same ? "The same person" : "Two people");
  return [
    ...faults(found.faces),
    make("div", { class: "card" },
      make("div", { class: "verdict" }, pair, make("div", {}, badge, make("p", { class: "says" }, says))),
      chart(found.score, found.threshold), make("p", { class: "fine" }, `The threshold stands for ${found.rate}.`)),
  ];
});

$("#verify-clear").onclick = () => {
  for (const place of document.querySelectorAll("#verify .drop")) place.clear();
  $("#verify-answer").replaceChildren();
  $("#file-first").focus();
};

$("#identify-go").onclick = () => answering($("#identify-answer"), $("#identify-go"), async () => {
  const found = await ask("identify", { picture: await encoded(slots.get("who")[0]), top: 5 });
  const cards = found.faces.map((face, number) => {
    const rows = face.candidates.map((one) => make("li", { class: one.reaches ? "reaches" : "" },
      make("span", {}, one.name), meter(one.score, found.threshold, one.reaches),
      make("span", { class: "num" }, one.score.toFixed(3))));
    const badge = make("span", { class: `badge ${face.name === null ? "unknown" : "yes"}` }, face.name ?? "Unknown");
    const list = rows.length ? make("ol", {}, ...rows) : make("p", { class: "fine" }, "Nobody is enrolled yet.");
    return make("div", { class: "card face" }, make("img", { src: face.picture, alt: `Face ${number + 1}, aligned` }),
      make("div", {}, badge, list, face.faults ? notice(capital(`${face.faults}.`)) : null));
  });
  const note = `A name is given from ${found.threshold.toFixed(3)} on: ${found.search}.`;
  return [...cards, make("p", { class: "fine" }, note)];
});

function meter(score, threshold, reaches) {
  const place = (cosine) => `${Math.max(0, Math.min(1, cosine)) * 100}%`;
  const colour = reaches ? "var(--genuine)" : "var(--soft)";
  return make("span", { class: "meter" }, make("svg", { "aria-hidden": "true" },
    make("rect", { x: 0, y: "25%", width: "100%", height: "50%", rx: 3, fill: "var(--line)", "fill-opacity": 0.6 }),
    make("rect", { x: 0, y: "25%", width: place(score), height: "50%", rx: 3, fill: colour }),
    make("line", {
      x1: place(threshold), x2: place(threshold), y1: 0, y2: "100%", stroke: "var(--ink)", "stroke-width": 2,
    })));
}

$("#enrol-form").onsubmit = (event) => {
  event.preventDefault();
  answering($("#enrol-answer"), $("#enrol-go"), async () => {
    const pictures = await Promise.all(slots.get("many").map(encoded));
    const done = await ask("enrol", { name: $("#enrol-name").value, pictures });
    const word = done.num_templates === 1 ? "template" : "templates";
    const known = done.num_known ? `, ${done.num_known} known already` : "";
    const told = `${done.name} is enrolled: ${done.num_templates} new ${word}${known}, ${done.num_in_all} in all.`;
    $("#enrol-name").value = "";
    $("#enrol .drop").clear();
    return [
      notice(told, "good"),
      ...done.left_out.map((one) => notice(`Photograph ${one.picture} was left out: ${one.reason}.`)),
      ...done.look_alikes.map((one) => notice(
        `${done.name} and ${one.name} may be one person under two names (score ${one.score.toFixed(3)}).`)),
    ];
  });
};

// -- the gallery ------------------------------------------------------------------------------------------------------

const MOST_ROWS = 500;

async function showPeople() {
  const list = $("#people-list");
  try {
    const { people } = await ask("people");
    const draw = () => {
      const wanted = $("#people-filter").value.trim().toLowerCase();
      drawPeople(people, people.filter((one) => one.name.toLowerCase().includes(wanted)));
    };
    $("#people-filter").oninput = draw;
    draw();
  } catch (error) {
    list.replaceChildren(notice(error.message, "bad"));
  }
}

function drawPeople(people, found) {
  const number = `${people.length.toLocaleString()} ${people.length === 1 ? "person" : "people"}`;
  $("#people-count").textContent = `${number}; names and templates are kept in this gallery's folder, nowhere else.`;
  const rows = found.slice(0, MOST_ROWS).map((one) => make("tr", {}, make("td", {}, one.name),
    make("td", { class: "num" }, String(one.num_templates)), make("td", { class: "since" }, one.enrolled.slice(0, 10)),
    make("td", { class: "num" }, make("button", {
      class: "plain small", "aria-label": `Remove ${one.name}`, onclick: () => remove(one.name),
    }, "Remove"))));
  const head = make("thead", {}, make("tr", {}, make("th", {}, "Name"), make("th", { class: "num" }, "Templates"),
    make("th", { class: "since" }, "Since"), make("th", {})));
  const nobody = make("p", { class: "quiet" }, people.length ? "Nobody of that name." : "Nobody is enrolled yet.");
  const more = found.length > MOST_ROWS
    ? [make("p", { class: "fine" }, `The first ${MOST_ROWS} of ${found.length.toLocaleString()} are shown.`)] : [];
  $("#people-list").replaceChildren(rows.length ? make("table", {}, head, make("tbody", {}, ...rows)) : nobody, ...more);
}

function remove(name) {
  const dialog = $("#sure");
  $("#sure-text").textContent = `The templates of ${name} are deleted. To have them again, enrol ${name} again.`;
  $("#sure-no").onclick = () => dialog.close();
  $("#sure-yes").onclick = async () => {
    dialog.close();
    try {
      await ask("remove", { name });
      await showPeople();
    } catch (error) {
      $("#people-list").prepend(notice(error.message, "bad"));
    }
  };
  dialog.showModal();
  $("#sure-no").focus();
}

function showModel() {
  const rows = {
    Model: about.model, "SHA-256": make("code", {}, about.sha256),
    "Equal error rate": `${(100 * about.eer).toFixed(1)} %`, "Measured on": about.basis,
    Threshold: `${about.threshold.toFixed(3)}: ${about.rate.split(", measured")[0]}`, "This gallery": about.search,
  };
  const list = Object.entries(rows).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  $("#model-about").replaceChildren(make("div", { class: "card" }, make("dl", {}, ...list), chart(null, about.threshold)));
}

// -- tabs, and the door -----------------------------------------------------------------------------------------------

const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", String(one === tab));
    one.tabIndex = one === tab ? 0 : -1;
    document.getElementById(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  tab.focus();
  if (tab.id === "tab-people") showPeople();
  if (tab.id === "tab-model")
    ask("model").then((found) => { about = found; showModel(); },
      (error) => $("#model-about").replaceChildren(notice(error.message, "bad")));
}

tabs.forEach((tab, number) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = step ? (number + step + tabs.length) % tabs.length : { Home: 0, End: tabs.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      choose(tabs[to]);
    }
  });
});

function showLogin(reason = "") {
  $("#app").hidden = true;
  $(".tabs").hidden = true;
  $("#login").hidden = false;
  $("#login-error").textContent = reason;
  $("#token").focus();
}

$("#login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("#token").value.trim());
  $("#token").value = "";
  begin();
};

async function begin() {
  if (!token()) return showLogin();
  try {
    about = await ask("model");
  } catch (error) {
    return showLogin(error.message);
  }
  $("#login").hidden = true;
  $(".tabs").hidden = false;
  $("#app").hidden = false;
  $("#cautions").replaceChildren(...about.cautions.map((text) => notice(capital(text.replace(/^warning: /, "")))));
}

for (const place of document.querySelectorAll(".drop")) slots.set(place.dataset.slot, []);
for (const place of document.querySelectorAll(".drop")) setUpDrop(place);
begin();
