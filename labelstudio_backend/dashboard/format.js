// Numbers and times as people read them.

const NONE = "–";

export const decimal = (value, digits = 3) => (value === null || value === undefined ? NONE : value.toFixed(digits));

export const percent = (value) => (value === null || value === undefined ? NONE : `${Math.round(100 * value)} %`);

export const whole = (value) => (value === null || value === undefined ? NONE : value.toLocaleString("en"));

/** A difference with its sign, and an arrow, so that colour is not the only sign. */
export function change(before, after) {
  if (typeof before !== "number" || typeof after !== "number") return { text: NONE, tone: "same" };
  const difference = after - before;
  if (Math.abs(difference) < 0.0005) return { text: "± 0", tone: "same" };
  const up = difference > 0;
  return { text: `${up ? "▲ +" : "▼ −"}${Math.abs(difference).toFixed(3)}`, tone: up ? "better" : "worse" };
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 1) return "under 1 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 36000) return `${(seconds / 3600).toFixed(1)} h`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

export function ago(unix) {
  const seconds = Date.now() / 1000 - unix;
  return seconds < 10 ? "just now" : `${duration(seconds)} ago`;
}

export const date = (unix) =>
  new Date(unix * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });

export const versionOf = (name) => /-(v\d+)$/.exec(name ?? "")?.[1] ?? name ?? NONE;

export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;
