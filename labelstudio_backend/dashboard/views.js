// The pages, made of the state; no requests and no events here.

import { lineChart } from "./charts.js";
import { h, svg } from "./dom.js";
import { ago, change, date, decimal, duration, percent, plural, versionOf, whole } from "./format.js";

const RUNTIMES = { torch: "PyTorch", onnxruntime: "ONNX Runtime", openvino: "OpenVINO" };
const OUTCOMES = {
  queued: ["waiting", "○"], running: ["running", "◐"], succeeded: ["good", "✓"],
  refused: ["plain", "="], failed: ["bad", "✕"], cancelled: ["plain", "–"],
};

const arrows = (text) => text?.replaceAll("->", "→"); // which no line breaks in two
const unknown = (state, error, pending) => h("p", { class: "soft" },
  !state.overview.server.label_studio ? "Not known without Label Studio's address." : error ? "Not known while Label Studio does not answer." : pending);
const reasonOf = (trigger) => (trigger === "START_TRAINING" ? "Train button in Label Studio" : trigger.charAt(0).toUpperCase() + trigger.slice(1));
const listed = (items) => items.map((item, index) => [index > 0 && ", ", item]);
const titleOf = (project) => project.title || `Project ${project.id}`;
const linkTo = (project) => `#/projects/${encodeURIComponent(project.key)}`;
const time = (unix) => h("time", { datetime: new Date(unix * 1000).toISOString(), title: date(unix) }, ago(unix));
const section = (id, heading, ...content) =>
  h("section", { "aria-labelledby": `${id}-h`, "data-key": id }, h("h2", { id: `${id}-h` }, heading), content);
const button = (state, text, action, data, label, kind) => {
  const attributes = Object.fromEntries(Object.entries(data).map(([name, value]) => [`data-${name}`, String(value)]));
  const disabled = state.busy ? { "aria-disabled": "true" } : {};
  return h("button", { type: "button", class: kind, "data-action": action, ...attributes, ...disabled, "aria-label": label }, text);
};
const badge = (kind, mark, text) => h("span", { class: `badge ${kind}` }, h("span", { "aria-hidden": "true" }, mark), ` ${text}`);
const scroll = (name, table) => h("div", { class: "scroll", role: "region", "aria-label": name, tabindex: "0" }, table);
const table = (caption, head, rows) =>
  scroll(caption, h("table", null,
    h("caption", null, caption),
    h("thead", null, h("tr", null, head.map(([text, kind]) => h("th", { scope: "col", class: kind }, text)))),
    h("tbody", null, rows)));
const number = (text, tone) => h("td", { class: tone ? `number ${tone}` : "number" }, text);

export function connectionLine(state) {
  if (state.failure) {
    const { status, message } = state.failure;
    const said = status ? `answers ${[status, message].filter(Boolean).join(": ")}` : "does not answer";
    return { tone: "bad", text: `The backend ${said}; trying again` };
  }
  if (!state.overview) return { tone: "waiting", text: "Connecting" };
  const { server, projects } = state.overview;
  if (!server.label_studio) return { tone: "bad", text: "Label Studio's address is not set" };
  if (projects.some(({ seen }) => seen.error)) return { tone: "bad", text: "Label Studio: see the problems" };
  return { tone: "good", text: projects.some(({ seen }) => seen.when) ? "Label Studio answers" : "The backend answers" };
}

export const FEW = 8; // projects that the top of the page names

export function navigation(state, kind, id) {
  const projects = state.overview.projects;
  if (projects.length < 2) return [];
  if (projects.length > FEW) return h("ul", { role: "list" }, h("li", null, h("a", { href: "#/", "aria-current": kind === "overview" && "page" }, `All ${whole(projects.length)} projects`)));
  const shown = kind === "jobs" ? state.job?.project : id;
  return h("ul", { role: "list" }, projects.map((project) =>
    h("li", null, h("a", { href: linkTo(project), "aria-current": kind !== "overview" && shown === project.key && "page" }, titleOf(project)))));
}

// -- all projects ------------------------------------------------------------------------------------------------------

export function overviewPage(state) {
  const { projects, jobs, server } = state.overview;
  const rows = projects.map((project) =>
    h("tr", { "data-key": project.key },
      h("th", { scope: "row" }, h("a", { href: linkTo(project) }, titleOf(project)), project.problem_count > 0 && h("span", { class: "note warn" }, `! ${plural(project.problem_count, "problem")}`)),
      h("td", null, project.serves ? versionOf(project.serves.name) : "–"),
      number(decimal(project.serves?.ap50)),
      number(project.tasks === null ? "–" : `${whole(project.labelled)} of ${whole(project.tasks)}`),
      h("td", null, jobs.some((job) => job.project === project.key && job.state === "running") ? badge("running", "◐", "training") : "")));
  const here = new URL(".", location.href).href.replace(/\/$/, "");
  const empty = h("p", { class: "soft" }, "No project is connected yet. Run ", h("code", null, `yolonas-labelstudio connect --project ID --url ${here}`), ", with the address under which Label Studio reaches this server where that is another.");
  return {
    title: "Projects",
    content: [
      h("h1", null, "Projects"),
      projects.length ? table("What serves in each project", [["Project"], ["Serves"], ["AP50", "number"], ["Labelled", "number"], ["Now"]], rows) : empty,
      section("queue", "Trainings", queueList(state, jobs), !server.can_train && h("p", { class: "soft" }, "This backend cannot train: it was started without Label Studio's address and token.")),
      h("p", { class: "foot" }, `yolonas ${server.version}`),
    ],
  };
}

function queueList(state, jobs) {
  if (!jobs.length) return h("p", { class: "soft" }, "No training runs or waits.");
  return jobs.map((job) => jobCard(state, job, { named: true }));
}

// -- one project -------------------------------------------------------------------------------------------------------

export function projectPage(state) {
  const { project } = state;
  if (state.missing) return missingPage(state.missing);
  if (!project) return { title: "Project", content: h("p", { class: "soft" }, "Loading …") };
  return {
    title: titleOf(project),
    content: [
      h("div", { class: "headline" },
        h("h1", null, titleOf(project)),
        project.url && h("a", { href: project.url, target: "_blank", rel: "noreferrer" }, "Open in Label Studio", h("span", { "aria-hidden": "true" }, " ↗"), h("span", { class: "unseen" }, " (new tab)"))),
      problems(project),
      tiles(project),
      training(state, project),
      versions(state, project),
      rounds(state, project),
      upcoming(state, project),
      labels(project),
    ],
  };
}

function missingPage(text) {
  return { title: "Not found", content: [h("h1", null, "Not found"), h("p", null, text), h("p", null, h("a", { href: "#/" }, "All projects"))] };
}

function problems(project) {
  if (!project.problems.length) return null;
  const items = project.problems.map(({ text, count, last }) =>
    h("li", null, text, count > 1 && h("span", { class: "soft" }, ` (${whole(count)} times, the last ${ago(last)})`)));
  return h("section", { class: "problems", "aria-labelledby": "problems-h", "data-key": "problems" },
    h("h2", { id: "problems-h" }, h("span", { "aria-hidden": "true" }, "! "), "Needs attention"), h("ul", null, items));
}

function tiles(project) {
  const { serves } = project;
  const last = project.rounds?.findLast(({ acceptance }) => acceptance !== null);
  const gained = change(serves?.before?.ap50, serves?.ap50);
  const shown = [
    ["Serves", serves ? versionOf(serves.name) : "–", serves ? how(serves) : "no version yet"],
    ["AP50", decimal(serves?.ap50), serves?.before && serves.ap50 !== null ? h("span", { class: gained.tone }, `${gained.text} against ${versionOf(serves.base)}`) : "not measured yet"],
    ["Left as predicted", percent(last?.acceptance), last ? `of ${plural(last.predicted, "box", "boxes")}, ${versionOf(last.name)}` : "no labels on predictions yet"],
    ["Time for a task", last?.seconds ? duration(last.seconds) : "–", last?.seconds ? `median while ${versionOf(last.name)} served` : "not measured yet"],
    ["Labelled", whole(project.labelled), project.tasks === null ? "" : `of ${plural(project.tasks, "task")}`],
  ];
  return h("dl", { class: "tiles", "data-key": "tiles" }, shown.map(([term, value, note]) =>
    h("div", null, h("dt", null, term), h("dd", { class: "value" }, value), h("dd", { class: "note" }, note))));
}

function how(version) {
  if (!version.trained) return `start weights ${version.weights}`;
  const { serving } = version;
  if (!serving) return "float in PyTorch";
  return `${serving.precision === "int8" ? "INT8" : "float"} in ${RUNTIMES[serving.runtime] ?? serving.runtime}`;
}

// -- trainings -----------------------------------------------------------------------------------------------------------

function training(state, project) {
  const active = project.jobs.filter((job) => job.state === "running" || job.state === "queued").reverse();
  const ended = project.jobs.filter((job) => !active.includes(job));
  const { server } = state.overview;
  const every = server.train_every ? `The next one starts after ${plural(server.train_every, "newly corrected task")}.` : "Trainings start when asked for.";
  const idle = server.can_train
    ? h("p", { class: "soft" }, `No training runs. ${every} `)
    : h("p", { class: "soft" }, "This backend cannot train: it was started without Label Studio's address and token.");
  const go = server.can_train && !active.length && h("p", null, button(state, "Train now", "train", { key: project.key }));
  return section("training", "Training", active.length ? active.map((job) => jobCard(state, job)) : [idle, go], ended.length > 0 && endedJobs(state, ended));
}

function jobCard(state, job, { named = false, heading = "h3" } = {}) {
  const running = job.state === "running";
  const measured = job.curve?.findLast(({ ap50 }) => typeof ap50 === "number");
  const facts = [
    job.epoch && `epoch ${job.epoch}`,
    job.curve?.length && `loss ${decimal(job.curve.at(-1).loss)}`,
    measured && `AP50 ${decimal(measured.ap50)}${measured.epoch < job.epoch ? ` in epoch ${measured.epoch}` : ""}`,
    job.seconds_left && `${duration(job.seconds_left)} left`,
  ].filter(Boolean);
  const project = named && state.overview.projects.find(({ key }) => key === job.project);
  return h("article", { class: "job", "data-key": `job-${job.id}`, "aria-labelledby": `job-${job.id}-h` },
    h("div", { class: "headline" },
      h(heading, { id: `job-${job.id}-h` }, h("a", { href: `#/jobs/${job.id}` }, `Training ${job.id}`), " ", badge(...OUTCOMES[job.state], job.cancelling ? "being cancelled" : running ? "running" : "waiting")),
      !job.cancelling && button(state, "Cancel", "cancel", { id: job.id }, `Cancel training ${job.id}`)),
    h("p", { class: "soft" }, project && [h("a", { href: linkTo(project) }, titleOf(project)), " · "], reasonOf(job.trigger)),
    running && [
      h("div", { class: "progress" },
        h("progress", { max: 1, value: job.progress.toFixed(4), "aria-label": `Progress of training ${job.id}` }),
        h("span", { class: "share" }, percent(job.progress))),
      h("p", { class: "facts" }, facts.length ? facts.join(" · ") : arrows(job.reason)),
      curves(state, job),
    ]);
}

function curves(state, job) {
  const inner = state.width - 34;
  const half = inner > 620 ? (inner - 24) / 2 : inner;
  const points = thin(job.curve ?? []);
  const epochs = points.map(({ epoch }) => String(epoch));
  const charts = [["loss", "Loss"], ["ap50", "AP50"]].map(([field, name]) => {
    const values = points.map((point) => point[field] ?? null);
    const known = values.filter((value) => value !== null);
    if (known.length < 2) return null;
    const text = `${name} over ${plural(job.curve.length, "epoch")}: from ${decimal(known[0])} to ${decimal(known.at(-1))}`;
    return h("div", null, h("p", { class: "name" }, name, h("span", { class: "soft" }, " by epoch")),
      lineChart({ name: text, labels: epochs, series: [{ name, values }], format: axis, width: Math.floor(half), tiny: true, dots: known.length < 25 }));
  });
  return charts.some(Boolean) ? h("div", { class: "curves" }, charts) : null;
}

const axis = (value) => (Math.abs(value) >= 10 ? value.toFixed(0) : value.toFixed(2));

/** At most 200 points of each curve, the last one among them: AP is measured in some of the epochs only. */
function thin(points) {
  const some = (all) => all.filter((_, index) => (all.length - 1 - index) % Math.ceil(all.length / 200) === 0);
  const kept = new Set([...some(points), ...some(points.filter(({ ap50 }) => typeof ap50 === "number"))]);
  return points.filter((point) => kept.has(point));
}

function endedJobs(state, jobs) {
  const shown = state.open.has("all-jobs") ? jobs : jobs.slice(0, 5);
  const rows = shown.map((job) => {
    const [kind, mark] = OUTCOMES[job.state];
    return h("tr", { "data-key": `ended-${job.id}` },
      h("th", { scope: "row", class: "name" }, h("a", { href: `#/jobs/${job.id}` }, `Training ${job.id}`)),
      h("td", null, badge(kind, mark, job.state)),
      h("td", { class: "long" }, job.version && h("b", null, `${versionOf(job.version)}: `), arrows(job.reason),
        ["failed", "cancelled"].includes(job.state) && button(state, "Retry", "retry", { id: job.id }, `Retry training ${job.id}`, "after")),
      h("td", { class: "number extra" }, job.started && job.finished ? duration(job.finished - job.started) : "–"),
      h("td", { class: "extra" }, time(job.finished ?? job.created)));
  });
  const more = jobs.length > 5 && h("p", null, h("button", { type: "button", class: "quiet", "data-action": "toggle", "data-id": "all-jobs", "aria-expanded": String(state.open.has("all-jobs")) }, state.open.has("all-jobs") ? "Show fewer" : `Show all ${jobs.length}`));
  return [table("Earlier trainings", [["Training"], ["Outcome"], ["Why"], ["Took", "number extra"], ["Ended", "extra"]], rows), more];
}

// -- versions ------------------------------------------------------------------------------------------------------------

function versions(state, project) {
  const all = state.versions?.versions ?? [];
  const measured = all.filter(({ ap50 }) => ap50 !== null).reverse();
  const chart = measured.length > 1 && lineChart({
    name: `Accuracy of ${measured.length} versions: AP50 from ${decimal(measured[0].ap50)} to ${decimal(measured.at(-1).ap50)}, AP from ${decimal(measured[0].ap)} to ${decimal(measured.at(-1).ap)}`,
    labels: measured.map(({ number: n }) => `v${n}`),
    series: [{ name: "AP50", values: measured.map(({ ap50 }) => ap50) }, { name: "AP", values: measured.map(({ ap }) => ap) }],
    range: [0, 1], format: (value) => value.toFixed(2), width: state.width,
  });
  const rows = all.flatMap((version) => versionRows(state, project, version));
  return section("versions", "Versions", chart,
    h("p", { class: "soft" }, "Each is measured on the tasks that were held out when it was trained, together with the version it started from."),
    all.length > 0 && table("Versions, the newest first", [["Version"], ["State"], ["AP50", "number"], ["Change", "number"], ["AP", "number extra"], ["Decision", "extra"], ["Runs as", "extra"], ["Made", "extra"], [h("span", { class: "unseen" }, "Actions")]], rows));
}

function versionRows(state, project, version) {
  const id = `version-${project.key}-${version.number}`;
  const open = state.open.has(id);
  const gained = change(version.before?.ap50, version.ap50);
  const data = { key: project.key, version: version.number, name: version.name };
  const short = `v${version.number}`;
  const actions = version.current
    ? version.pinned ? button(state, "Unpin", "unpin", data, `Unpin ${short}`) : version.trained && button(state, "Pin", "pin", data, `Pin ${short}`)
    : !version.removed && button(state, "Serve", "rollback", data, `Serve ${short}`);
  const row = h("tr", { "data-key": id, class: version.current && "current" },
    h("th", { scope: "row" }, h("button", { type: "button", class: "fold", "data-action": "toggle", "data-id": id, "aria-expanded": String(open), "aria-label": `Details of ${short}` }, h("span", { class: "arrow", "aria-hidden": "true" }), short)),
    h("td", null, version.current ? badge("good", "●", version.pinned ? "serves, pinned" : "serves") : version.removed ? badge("plain", "–", "files removed") : version.candidate ? badge("waiting", "○", "candidate") : ""),
    number(decimal(version.ap50)), number(gained.text, gained.tone), number(decimal(version.ap), "extra"),
    h("td", { class: "extra" }, decision(version)), h("td", { class: "extra" }, how(version)),
    h("td", { class: "extra" }, version.published ? time(version.published) : "–"), h("td", null, actions));
  return open ? [row, h("tr", { "data-key": `${id}-more`, class: "more" }, h("td", { colspan: 9 }, h("div", { class: "inside" }, versionDetails(version))))] : [row];
}

const decision = ({ gate, trained }) =>
  !trained ? "start" : !gate ? "–" : gate.measured ? badge(gate.decision === "published" ? "good" : "plain", gate.decision === "published" ? "✓" : "=", gate.decision) : badge("plain", "~", `${gate.decision}, not measured`);

function versionDetails(version) {
  const { gate, tasks, training: run } = version;
  const facts = [
    ["Name", h("code", null, version.name)],
    ["Runs as", how(version)],
    version.published && ["Made", date(version.published)],
    version.ap50 !== null && ["Accuracy", `AP50 ${decimal(version.ap50)}, AP ${decimal(version.ap)}`],
    gate && ["Decision", arrows(gate.reason)],
    gate?.share_of_resamples_worse !== null && gate?.share_of_resamples_worse !== undefined && ["Bootstrap", `worse in ${percent(gate.share_of_resamples_worse)} of the resamples`],
    tasks && ["Learned from", `${plural(tasks.train, "image")} with ${plural(tasks.train_boxes, "box", "boxes")}; judged on ${plural(tasks.held_out, "image")} with ${plural(tasks.held_out_boxes, "box", "boxes")}`],
    tasks?.unusable > 0 && ["Left out", `${plural(tasks.unusable, "image or box", "images or boxes")}: ${tasks.unusable_because?.[0] ?? ""}`],
    run && ["Training", `${plural(run.epochs, "epoch")} in ${duration(run.seconds)}, variant ${run.variant}, operating threshold ${decimal(run.threshold, 2)}`],
    version.trigger && ["Why", reasonOf(version.trigger)],
    ...(version.serving?.remarks ?? []).map((remark) => ["Remark", remark]),
    version.report && ["Report", h("a", { href: version.report, target: "_blank", rel: "noreferrer" }, "The training's report", h("span", { "aria-hidden": "true" }, " ↗"), h("span", { class: "unseen" }, " (new tab)"))],
  ].filter(Boolean);
  const classes = version.per_class.map(({ label, before, after }) => {
    const { text, tone } = change(before, after);
    return h("tr", null, h("th", { scope: "row" }, h("bdi", null, label)), number(decimal(before), "extra"), number(decimal(after)), number(text, tone));
  });
  return [
    h("dl", { class: "details" }, facts.map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value)))),
    classes.length > 0 && table(`AP of v${version.number} by class`, [["Class"], [`Before (${versionOf(version.base)})`, "number extra"], ["AP", "number"], ["Change", "number"]], classes),
  ];
}

// -- people's work ---------------------------------------------------------------------------------------------------------

function rounds(state, project) {
  const all = project.rounds;
  if (all === null) return section("work", "What people change", unknown(state, project.seen.error, "Being counted …"));
  if (!all.length) return section("work", "What people change", h("p", { class: "soft" }, "Once tasks are submitted, this shows how many of the predicted boxes were left as they were."));
  const named = all.filter(({ acceptance }) => acceptance !== null);
  const chart = named.length > 1 && lineChart({
    name: `Boxes left as predicted over ${named.length} rounds: from ${percent(named[0].acceptance)} to ${percent(named.at(-1).acceptance)}`,
    labels: named.map(({ name }) => versionOf(name)),
    series: [{ name: "Left as predicted", values: named.map(({ acceptance }) => acceptance) }],
    range: [0, 1], format: percent, width: state.width,
  });
  const rows = all.map((one) => h("tr", null,
    h("th", { scope: "row" }, one.name ? versionOf(one.name) : "before the first"),
    number(whole(one.tasks)), number(percent(one.acceptance)), [one.moved, one.relabelled, one.removed, one.added].map((count) => number(whole(count), "extra")),
    number(one.tasks ? decimal(one.edits / one.tasks, 1) : "–"), number(one.seconds === null ? "–" : duration(one.seconds))));
  return section("work", "What people change", chart,
    h("p", { class: "soft" }, "By the version that served when the task was submitted. A box counts as left where its class is the same and it hardly moved."),
    table("Work by round", [["While"], ["Tasks", "number"], ["Left", "number"], ["Moved", "number extra"], ["Relabelled", "number extra"], ["Removed", "number extra"], ["Added", "number extra"], ["Edits a task", "number"], ["Time a task", "number"]], rows));
}

// -- what to label next ------------------------------------------------------------------------------------------------------

function upcoming(state, project) {
  const next = state.next;
  if (!next || next.tasks === null) return section("next", "To label next", unknown(state, next?.seen.error, "Being asked …"));
  if (!next.tasks.length) return section("next", "To label next", h("p", { class: "soft" }, "Every task is labelled or skipped."));
  const names = [...new Set(next.tasks.flatMap(({ boxes }) => boxes.map(({ label }) => label)))].sort();
  const sampled = next.sampling === "Uncertainty sampling";
  return section("next", "To label next",
    h("p", { class: "soft" }, "By their scores, lowest first (YOLONAS_ACQUISITION). ", sampled ? "Label Studio serves them in this order." : "Label Studio serves them in another: the project's sampling is not “Uncertainty sampling”."),
    names.length > 0 && h("ul", { class: "legend swatches", role: "list" }, names.map((name, index) => h("li", null, svg("svg", { class: "key", viewBox: "0 0 16 12", width: 16, height: 12, "aria-hidden": "true" }, svg("rect", { class: "box under", x: 2, y: 2, width: 12, height: 8 }), svg("rect", { class: `box b${index % 6}`, x: 2, y: 2, width: 12, height: 8 })), h("bdi", null, name)))),
    h("ul", { class: "shots", role: "list" }, next.tasks.map((task) => shot(state, task, names))));
}

function shot(state, task, names) {
  const counts = Object.entries(task.counts).map(([label, count]) => [`${whole(count)} × `, h("bdi", null, label)]);
  const found = [task.tracks > 0 && `${plural(task.tracks, "track")}: `, counts.length ? listed(counts) : "nothing found"];
  const [width, height] = task.size ?? [4, 3];
  const boxes = task.boxes.map(({ x, y, width: w, height: h, rotation, label }) => {
    const [left, top] = [(x * width) / 100, (y * height) / 100];
    const place = { x: left, y: top, width: (w * width) / 100, height: (h * height) / 100, transform: rotation ? `rotate(${rotation} ${left} ${top})` : null };
    return [svg("rect", { class: "box under", ...place }), svg("rect", { class: `box b${names.indexOf(label) % 6}`, ...place })];
  });
  const image = svg("image", { href: task.thumbnail, width, height });
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, image, boxes);
  const tile = !task.thumbnail ? h("span", { class: "shot none" }) : state.gone.has(task.thumbnail) ? h("span", { class: "shot gone" }) : h("span", { class: "shot" }, picture);
  const caption = [h("span", { class: "line" }, h("b", null, `Task ${task.id}`), h("span", { class: "soft" }, task.score === null ? "" : `score ${decimal(task.score, 2)}`)), h("span", { class: "soft found" }, task.predicted ? found : "not predicted yet")];
  const inside = [tile, caption];
  return h("li", { "data-key": `task-${task.id}` }, task.url ? h("a", { href: task.url, target: "_blank", rel: "noreferrer" }, inside, h("span", { class: "unseen" }, " (opens in Label Studio, new tab)")) : inside);
}

// -- labels ------------------------------------------------------------------------------------------------------------------

function labels(project) {
  const { controls, problem } = project.labels;
  const rows = controls.flatMap((control) => control.labels.map(({ label, classes, advice }) => h("tr", null,
    h("th", { scope: "row" }, h("bdi", null, label)),
    controls.length > 1 && h("td", null, control.name),
    h("td", { class: "long" }, classes === null || classes === undefined ? "not known yet" : classes.length ? [badge("good", "✓", "predicted"), " from ", listed(classes.map((name) => h("bdi", null, name)))] : [badge("bad", "!", "not predicted"), " ", advice]))));
  const head = [["Label"], ...(controls.length > 1 ? [["Control"]] : []), ["Comes from"]];
  return section("labels", "Labels", problem && h("p", { class: "soft" }, problem), rows.length > 0 && table("Which class of the model becomes which label", head, rows));
}

// -- one training --------------------------------------------------------------------------------------------------------------

export function jobPage(state) {
  const { job } = state;
  if (state.missing) return missingPage(state.missing);
  if (!job) return { title: "Training", content: h("p", { class: "soft" }, "Loading …") };
  const project = state.overview.projects.find(({ key }) => key === job.project);
  const active = job.state === "running" || job.state === "queued";
  const [kind, mark] = OUTCOMES[job.state];
  const facts = [
    project && ["Project", h("a", { href: linkTo(project) }, titleOf(project))],
    ["Why", reasonOf(job.trigger)],
    ["Queued", time(job.created)],
    job.finished && ["Ended", time(job.finished)],
    job.started && job.finished && ["Took", duration(job.finished - job.started)],
    job.base && ["Started from", h("code", null, job.base)],
    job.version && ["Made", h("code", null, job.version)],
    job.after && ["AP50", `${decimal(job.before?.ap50)} before, ${decimal(job.after.ap50)} after`],
    job.restarts > 0 && ["Restarts", whole(job.restarts)],
  ].filter(Boolean);
  return {
    title: `Training ${job.id}`,
    content: [
      h("div", { class: "headline" }, h("h1", null, `Training ${job.id}`), !active && badge(kind, mark, job.state)),
      active ? jobCard(state, job, { heading: "h2" }) : h("p", { class: "reading" }, arrows(job.reason)),
      h("dl", { class: "details" }, facts.map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value)))),
      !active && curves(state, job),
      section("log", "Log", job.log.length ? h("pre", { tabindex: "0", role: "region", "aria-label": "The end of the log" }, job.log.join("\n")) : h("p", { class: "soft" }, "Nothing is written yet.")),
    ],
  };
}
