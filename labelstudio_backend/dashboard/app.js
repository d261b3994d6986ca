// State, polling and actions; views.js makes the page of the state. Everything is asked from this server, by paths
// relative to the page, so that it also works below a sub-path.

import { h, patch } from "./dom.js";
import { versionOf } from "./format.js";
import { FEW, navigation, overviewPage, projectPage, jobPage, connectionLine } from "./views.js";

const QUICK = 1000; // ms: Label Studio was not asked yet
const RUNNING = 2000; // a training runs
const IDLE = 10000;
const LONGEST = 30000; // between tries while the backend does not answer
const PATIENCE = 20000; // with one round of questions

const $ = (id) => document.getElementById(id);
const state = { overview: null, project: null, versions: null, next: null, job: null, ended: [], open: new Set(), gone: new Set(), busy: null, problem: null, missing: null, failure: null, width: 0 };
let failures = 0;
let timer = 0;
let asking = null;
const told = new Map();

function route() {
  const [, kind, id] = /^#\/(projects|jobs)\/([^/]+)$/.exec(location.hash) ?? [];
  if (kind) return { kind, id: decoded(id) };
  const only = state.overview?.projects.length === 1 && location.hash === "";
  return only ? { kind: "projects", id: state.overview.projects[0].key } : { kind: "overview" };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // written by hand, and the name of nothing
  }
}

function contentWidth() {
  const { clientWidth } = $("main");
  const { paddingLeft, paddingRight } = getComputedStyle($("main"));
  return Math.floor(clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight));
}

async function get(path) {
  const answer = await fetch(`api/${path}`, { headers: { Accept: "application/json" }, cache: "no-store", signal: asking.signal });
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

/** What an answer says that is no success, this backend's or a proxy's: an error with the answer's `status`. */
async function refusal(answer) {
  const said = await answer.json().catch(() => null);
  return Object.assign(new Error(said?.error ?? said?.detail ?? answer.statusText), { status: answer.status });
}

async function load() {
  const { signal } = asking;
  const overview = await get("projects");
  const gone = (state.overview?.jobs ?? []).filter(({ id }) => !overview.jobs.some((job) => job.id === id));
  const ended = (await Promise.all(gone.map(({ id }) => get(`jobs/${id}`).catch(() => null)))).filter(Boolean);
  signal.throwIfAborted(); // the round after this one tells what ended
  [state.ended, state.overview] = [ended, overview];
  const { kind, id } = route();
  try {
    if (kind === "projects") {
      const key = encodeURIComponent(id);
      [state.project, state.versions, state.next] = await Promise.all([
        get(`projects/${key}`), get(`projects/${key}/versions`), get(`projects/${key}/next`),
      ]);
    } else if (kind === "jobs") state.job = await get(`jobs/${encodeURIComponent(id)}`);
    state.missing = null;
  } catch (error) {
    if (error.status !== 404 && error.status !== 400) throw error;
    state.missing = error.message || `The answer was ${error.status}.`;
  }
}

async function tick() {
  clearTimeout(timer);
  asking?.abort();
  const mine = (asking = new AbortController());
  const patience = setTimeout(() => mine.abort(), PATIENCE);
  let failure = null;
  try {
    await load();
  } catch (error) {
    failure = error;
  }
  clearTimeout(patience);
  if (mine !== asking) return; // asked anew meanwhile
  const turned = Boolean(failure) !== Boolean(state.failure);
  state.failure = failure;
  failures = failure ? failures + 1 : 0;
  render();
  tell(turned ? [failure ? connectionLine(state).text : "The backend answers again"] : []);
  if (!document.hidden) timer = setTimeout(tick, pause());
}

function pause() {
  if (failures) return Math.min(RUNNING * 2 ** (failures - 1), LONGEST);
  const { server, projects, jobs } = state.overview;
  const { kind } = route();
  const few = projects.length <= FEW;
  const { project, next } = state;
  const beingAsked = kind === "projects" && project && !project.seen.error && (project.rounds === null || next.tasks === null);
  const named = few || kind === "overview" ? projects : [];
  if (server.label_studio && beingAsked) return QUICK;
  if (server.label_studio && named.some(({ seen }) => !seen.when && !seen.error)) return few ? QUICK : RUNNING;
  return jobs.length ? RUNNING : IDLE;
}

function render() {
  state.width = contentWidth();
  const { kind, id } = route();
  const connection = connectionLine(state);
  patch($("connection"), h("p", { id: "connection", class: `connection ${connection.tone}` }, h("span", { class: "dot", "aria-hidden": "true" }), connection.text));
  if (!state.overview) return;
  patch($("nav"), h("nav", { id: "nav", "aria-label": "Projects" }, navigation(state, kind, id)));
  const pages = { overview: overviewPage, projects: projectPage, jobs: jobPage };
  const page = pages[kind](state);
  const focused = document.activeElement;
  patch($("main"), h("main", { id: "main", tabindex: "-1" }, state.problem && alert(state.problem), page.content));
  if (!focused?.isConnected) focusContent();
  const title = `${page.title} · yolonas`;
  if (document.title !== title) document.title = title;
}

/** Where the focused element is gone, people go on from the content and not from the top of the page. */
function focusContent() {
  if (document.activeElement === document.body) $("main").focus({ preventScroll: true });
}

function alert(text) {
  const close = h("button", { type: "button", "data-action": "dismiss" }, "Dismiss");
  return h("div", { class: "notice", role: "alert", "data-key": "alert" }, h("p", null, text), close);
}

/** Tell screen readers the news, and what happened to jobs since the last time, in words and not at each poll. */
function tell(news) {
  const jobs = [...(state.overview?.jobs ?? []), ...(state.project?.jobs ?? []), ...state.ended];
  for (const job of jobs) {
    const quarter = job.state === "running" ? Math.floor(job.progress * 4) * 25 : null;
    const line = job.state === "running" ? `Training ${job.id} is running, ${quarter} percent done` : `Training ${job.id} ${job.state}`;
    if (told.has(job.id) && told.get(job.id) !== line) news.push(line);
    told.set(job.id, line);
  }
  if (news.length) $("live").textContent = [...new Set(news)].join(". ");
}

// -- actions ---------------------------------------------------------------------------------------------------------

const ACTIONS = {
  cancel: ({ id }) => ({
    path: `jobs/${id}/cancel`,
    confirm: [`Cancel training ${id}?`, "What it has learnt so far is lost. The version that serves goes on serving.", "Cancel the training"],
    done: `Training ${id} is being cancelled`,
  }),
  retry: ({ id }) => ({ path: `jobs/${id}/retry`, done: `Training ${id} is queued again` }),
  train: ({ key }) => ({ path: `projects/${key}/train`, done: "A training is queued" }),
  rollback: ({ key, version, name }) => ({
    path: `projects/${key}/rollback`,
    body: { version: Number(version) },
    confirm: [`Have ${versionOf(name)} serve?`, `Predictions will come from ${name} from now on, and the project's tasks are predicted again with it.`, `Serve ${versionOf(name)}`],
    done: `${versionOf(name)} serves now`,
  }),
  pin: ({ key, version, name }) => ({
    path: `projects/${key}/pin`,
    body: { version: Number(version) },
    confirm: [`Pin ${versionOf(name)}?`, `${name} goes on serving whatever is trained, until it is unpinned.`, `Pin ${versionOf(name)}`],
    done: `${versionOf(name)} is pinned`,
  }),
  unpin: ({ key }) => ({ path: `projects/${key}/pin`, body: { version: null }, done: "The version is not pinned any more" }),
};

function confirmed([title, text, yes]) {
  const dialog = $("dialog");
  $("dialog-title").textContent = title;
  $("dialog-text").textContent = text;
  $("dialog-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    focusContent(); // its button may have gone meanwhile
    resolve(dialog.returnValue === "yes");
  }, { once: true }));
}

async function act(name, data) {
  const { path, body = {}, confirm, done } = ACTIONS[name](data);
  if (state.busy || (confirm && !(await confirmed(confirm)))) return;
  state.busy = path;
  render();
  try {
    const headers = { "Content-Type": "application/json", Accept: "application/json" };
    const answer = await fetch(`api/${path}`, { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(30000) });
    if (!answer.ok) throw await refusal(answer);
    state.problem = null;
    $("live").textContent = done;
  } catch (error) {
    state.problem = `That did not work: ${error.message || error.status}`;
  }
  state.busy = null;
  await tick();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button || button.getAttribute("aria-disabled") === "true") return;
  const { action } = button.dataset;
  if (action === "toggle") {
    const { id } = button.dataset;
    if (!state.open.delete(id)) state.open.add(id);
    render();
  } else if (action === "dismiss") {
    state.problem = null;
    render();
  } else act(action, button.dataset);
});
$("dialog-yes").addEventListener("click", () => $("dialog").close("yes"));
$("dialog-no").addEventListener("click", () => $("dialog").close("no"));
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : tick()));
addEventListener("hashchange", () => {
  state.project = state.versions = state.next = state.job = state.problem = state.missing = null;
  state.gone.clear();
  render();
  scrollTo(0, 0);
  $("main").focus({ preventScroll: true });
  tick();
});
let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => state.width !== contentWidth() && render());
});
// An image that cannot be had is said so, and not shown as a broken one.
document.addEventListener("error", ({ target }) => {
  if (!target.matches?.(".shot image")) return;
  const picture = target.getAttribute("href");
  state.gone.add(picture);
  render();
  setTimeout(() => state.gone.delete(picture), LONGEST); // asked for again by the next render
}, true);
tick();
