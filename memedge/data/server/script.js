"use strict";
const at = (id) => document.getElementById(id);
const past = [];
const say = (number) => (number === null ? "—" : number.toFixed(3).replace("-", "−"));

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if (at("token").value) headers.Authorization = `Bearer ${at("token").value}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const found = await answer.json();
  if (answer.status === 401) at("bearer").hidden = false;
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function show(verdict) {
  at("answer").hidden = false;
  at("words").hidden = true;
  const kind = verdict.memorized ? "memorized" : "clean";
  at("verdict").textContent = verdict.memorized ? "Memorized" : "Not memorized";
  at("verdict").className = at("gauge").className = kind;
  at("gauge").classList.add("gauge");
  at("reason").textContent = `${verdict.reason}.` + (verdict.truncated ? " The prompt is longer than the model reads." : "");
  // What was left out of the score is not known: then the norm says where the prompt is.
  const value = verdict.score === null ? verdict.norm : verdict.score;
  const most = Math.max(value, verdict.threshold, 1e-9) * 1.25;
  at("fill").style.width = `${Math.max(0, Math.min(1, value / most)) * 100}%`;
  at("mark").style.left = `${Math.max(0, Math.min(1, verdict.threshold / most)) * 100}%`;
  at("gauge").setAttribute("aria-label", `score ${say(verdict.score)}, threshold ${say(verdict.threshold)}`);
  at("numbers").textContent =
    `score ${say(verdict.score)} · threshold ${say(verdict.threshold)} (the mark) · norm ${say(verdict.norm)} · ` +
    `alignment ${say(verdict.alignment)} · ${verdict.passes} ${verdict.passes === 1 ? "pass" : "passes"} of the UNet`;
}

function fail(error) {
  at("answer").hidden = false;
  at("verdict").textContent = "No verdict";
  at("verdict").className = "";
  at("reason").textContent = error.message;
  at("fill").style.width = "0";
  at("numbers").textContent = "";
  at("words").hidden = true;
}

function remember(verdict) {
  past.unshift(verdict);
  past.splice(20);
  at("past").hidden = false;
  at("history").replaceChildren(...past.map((one) => {
    const row = document.createElement("tr");
    const cells = [document.createElement("td"), document.createElement("td"), document.createElement("td")];
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = one.prompt || "(empty)";
    again.addEventListener("click", () => { at("prompt").value = one.prompt; show(one); at("prompt").focus(); });
    cells[0].append(again);
    cells[1].textContent = one.memorized ? "memorized" : "not memorized";
    cells[1].className = one.memorized ? "memorized" : "clean";
    cells[2].textContent = say(one.score);
    cells[2].className = "number";
    row.append(...cells);
    return row;
  }));
}

function weigh(explanation) {
  const line = at("words");
  const deepest = Math.max(1e-9, ...explanation.words.map((word) => Math.abs(word.significance ?? 0)));
  line.replaceChildren();
  let end = 0;
  const letters = [...explanation.prompt];  // places count characters, as Python does
  for (const word of explanation.words) {
    line.append(letters.slice(end, word.start).join(""));
    end = word.end;
    const part = document.createElement("span");
    part.textContent = word.text;
    if (word.significance === null) {
      part.style.textDecoration = "line-through";
      part.style.color = "inherit";
      part.title = "not read: the prompt is too long";
    } else {
      const share = Math.abs(word.significance) / deepest;
      const [red, green, blue] = word.significance > 0 ? [214, 64, 48] : [56, 120, 200];
      const mix = (full) => Math.round(255 + share * 0.8 * (full - 255));
      part.style.background = `rgb(${mix(red)},${mix(green)},${mix(blue)})`;
      part.title = `${word.significance > 0 ? "+" : ""}${say(word.significance)}`;
    }
    line.append(part);
  }
  line.hidden = false;
}

async function busy(work) {
  at("judge").disabled = at("explain").disabled = true;
  try { await work(); } catch (error) { fail(error); }
  at("judge").disabled = at("explain").disabled = false;
}

async function judge() {
  const verdict = (await ask("v1/verdicts", { prompts: [at("prompt").value], early: "off" })).verdicts[0];
  show(verdict);
  remember(verdict);
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); busy(judge); });
at("explain").addEventListener("click", () => busy(async () => {
  if (!at("ask").reportValidity()) return;
  await judge();
  weigh((await ask("v1/explanations", { prompt: at("prompt").value })).explanation);
}));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
ask("v1/engine").then((found) => {
  const { manifest, provider, precision, rule } = found.info;
  at("engine").textContent = `Engine of ${manifest.source.id}, ${provider} ${precision}, threshold ${say(rule.threshold)}.`;
}).catch((error) => { at("engine").textContent = error.message; });
