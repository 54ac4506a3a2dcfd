// The browser of rollouts: filters over columns, and a prompt's whole group with its tokens colored.
(() => {
  const { element } = report;
  const data = JSON.parse(document.getElementById("rollout-data").textContent);
  const byId = (id) => document.getElementById(id);
  const size = 25;
  const number = data.group.length;
  const groupOf = Int32Array.from(data.group);
  const rewards = Float64Array.from(data.reward, (value) => (value === null ? NaN : value));
  const members = data.groups.map(() => []);
  groupOf.forEach((group, row) => members[group].push(row));
  const keyOf = (run, iteration, id) => `${run} ${iteration} ${id}`;
  const openable = new Map(data.groups.map((group, index) => [keyOf(group.run, group.iteration, group.prompt_id), index]));
  report.hasGroup = (run, iteration, id) => openable.has(keyOf(run, iteration, id));

  // --- filters ----------------------------------------------------------------------------------------------------------

  let haystacks = null; // lower-case texts, made once
  const lowerTexts = () => {
    haystacks ??= { prompts: data.groups.map((g) => g.prompt.toLowerCase()), responses: data.response.map((r) => r.toLowerCase()) };
    return haystacks;
  };

  const fields = ["text", "run", "stage", "source", "state", "reward-low", "reward-high", "iteration-low", "iteration-high"];
  const value = (field) => byId(`filter-${field}`).value;
  const bound = (field, otherwise) => (value(field) === "" ? otherwise : Number(value(field)));
  let found = [];
  let first = 0;
  let last = { key: null, text: "", rows: null }; // the answer to a longer text is among that to a shorter one

  const filter = () => {
    const started = performance.now();
    const text = value("text").toLowerCase();
    const key = JSON.stringify(fields.slice(1).map(value));
    const narrows = last.key === key && text.startsWith(last.text);
    let rows = narrows ? last.rows : null;
    if (rows === null) {
      const [low, high] = [bound("reward-low", -Infinity), bound("reward-high", Infinity)];
      const [from, to] = [bound("iteration-low", -Infinity), bound("iteration-high", Infinity)];
      const bounded = low > -Infinity || high < Infinity;
      const timed = from > -Infinity || to < Infinity;
      const [run, stage, source, state] = ["run", "stage", "source", "state"].map(value);
      const passes = data.groups.map((group) => (run === "" || group.run === Number(run))
        && (stage === "" || group.stage === stage) && (source === "" || group.source === source)
        && (!timed || (group.iteration !== null && group.iteration >= from && group.iteration <= to)));
      rows = [];
      for (let row = 0; row < number; row++) {
        if (!passes[groupOf[row]]) continue;
        if (bounded && !(rewards[row] >= low && rewards[row] <= high)) continue;
        if (state !== "" && data.state[row] !== (state === "finished" ? "" : state)) continue;
        rows.push(row);
      }
    }
    if (text !== "") {
      const { prompts, responses } = lowerTexts();
      const inPrompt = prompts.map((prompt) => prompt.includes(text));
      rows = rows.filter((row) => inPrompt[groupOf[row]] || responses[row].includes(text));
    }
    last = { key, text, rows };
    found = rows;
    first = 0;
    show();
    byId("filter-status").dataset.milliseconds = String(performance.now() - started);
  };

  const excerpt = (text) => (text.length > 160 ? `${text.slice(0, 160)}…` : text) || "(empty)";
  const shown = (reward) => (reward === null ? "–" : String(Number(reward.toPrecision(4))));

  const show = () => {
    const rows = found.slice(first, first + size).map((row) => {
      const group = data.groups[groupOf[row]];
      const button = element("button", { type: "button", "aria-label": `Open the group of rollout ${row + 1}` }, "Open");
      button.addEventListener("click", () => open(groupOf[row]));
      const where = group.iteration ?? group.stage;
      const label = report.labels.length > 1 ? `${report.labels[group.run]} ${where}` : String(where);
      const cells = [label, group.source, shown(data.reward[row]), `${data.length[row]} ${data.state[row]}`];
      return element(
        "tr", {}, element("td", {}, button), ...cells.map((cell) => element("td", {}, cell)),
        element("td", {}, excerpt(data.response[row])),
      );
    });
    byId("rollout-table").tBodies[0].replaceChildren(...rows);
    const groups = new Set(found.map((row) => groupOf[row])).size;
    byId("filter-status").textContent = `${found.length} of ${number} rollouts, of ${groups} groups`;
    const pages = Math.max(1, Math.ceil(found.length / size));
    byId("page-number").textContent = `page ${first / size + 1} of ${pages}`;
    byId("page-before").disabled = first === 0;
    byId("page-after").disabled = first + size >= found.length;
  };

  const choices = (field, entries) => {
    const select = byId(`filter-${field}`);
    select.append(element("option", { value: "" }, "all"), ...entries.map(([key, text]) => element("option", { value: key }, text)));
    select.closest("p").hidden = entries.length < 2;
  };

  // --- a group ------------------------------------------------------------------------------------------------------------

  const dialog = byId("group");
  let current = null;

  const colorsOf = (name, values) => {
    const known = values.filter((v) => v !== null);
    const center = name === "advantage" || name === "entropy" ? 0 : 1;
    const largest = Math.max(1e-12, ...known.map((v) => Math.abs(v - center)));
    const css = getComputedStyle(document.documentElement);
    const [good, bad] = ["--good", "--bad"].map((variable) => css.getPropertyValue(variable).trim());
    const of = (v) => {
      if (v === null) return "";
      const alpha = Math.round(0.55 * 255 * Math.min(1, Math.abs(v - center) / largest));
      return (v >= center ? good : bad) + alpha.toString(16).padStart(2, "0");
    };
    const legend = {
      advantage: "Blue raises the token's probability, orange lowers it; stronger is further from 0.",
      entropy: "Stronger blue is more entropy.",
    }[name] ?? "Blue is above 1, orange below; stronger is further from 1.";
    if (known.every((v) => v === center)) return { of: () => "", legend: `All are ${center}.` };
    return { of, legend: `${legend} Strongest: ${(center + largest).toPrecision(3)}${center ? ` or ${(center - largest).toPrecision(3)}` : ""}.` };
  };

  const paint = () => {
    const name = byId("token-color").value;
    const rows = members[current].filter((row) => data.tokens[row] && data.tokens[row].values[name]);
    const colors = name === "" ? null : colorsOf(name, rows.flatMap((row) => data.tokens[row].values[name]));
    byId("color-legend").textContent = colors ? colors.legend : "";
    for (const row of rows) {
      const values = data.tokens[row].values[name];
      byId(`response-${row}`).querySelectorAll("span").forEach((span, token) => {
        span.style.backgroundColor = colors ? colors.of(values[token]) : "";
      });
    }
    if (name === "") byId("group-rollouts").querySelectorAll("span").forEach((span) => { span.style.backgroundColor = ""; });
  };

  const tokenTable = (row) => {
    const { texts, values } = data.tokens[row];
    const details = element("details", {}, element("summary", {}, `Values of the tokens of rollout ${data.sample[row]}`));
    details.addEventListener("toggle", () => {
      if (!details.open || details.querySelector("table")) return;
      const names = Object.keys(values);
      const heading = (text, scope) => element("th", { scope }, text);
      const lines = texts.map((text, token) => element(
        "tr", {}, heading(JSON.stringify(text), "row"), ...names.map((name) => element("td", {}, values[name][token] ?? "–")),
      ));
      details.append(element(
        "div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Values of the tokens of rollout ${data.sample[row]}` },
        element(
          "table", {}, element("thead", {}, element("tr", {}, heading("token", "col"), ...names.map((name) => heading(name, "col")))),
          element("tbody", {}, ...lines),
        ),
      ));
    });
    return details;
  };

  const articleOf = (row) => {
    const state = data.state[row] ? `, ${data.state[row]}` : "";
    const title = `Rollout ${data.sample[row]}: reward ${shown(data.reward[row])}, ${data.length[row]} tokens${state}`;
    const article = element("article", {}, element("h3", {}, title));
    const components = Object.entries(data.components[row]);
    if (components.length > 1) {
      article.append(element("p", { class: "muted" }, components.map(([name, v]) => `${name} ${shown(v)}`).join(", ")));
    }
    const tokens = data.tokens[row];
    const response = element("p", { class: "response", id: `response-${row}` });
    article.append(response);
    if (!tokens) {
      response.append(data.response[row] || "(empty)");
      return article;
    }
    const names = Object.keys(tokens.values);
    response.append(...tokens.texts.map((text, token) => element(
      "span", { title: names.map((name) => `${name} ${tokens.values[name][token] ?? "–"}`).join(", ") }, text,
    )));
    article.append(tokenTable(row));
    if (tokens.texts.length < data.length[row]) {
      article.append(
        element("p", { class: "muted" }, `Values are known of the first ${tokens.texts.length} of ${data.length[row]} tokens.`),
        element("details", {}, element("summary", {}, "Whole response"), element("p", { class: "response" }, data.response[row])),
      );
    }
    return article;
  };

  const open = (index) => {
    current = index;
    const group = data.groups[index];
    const rows = [...members[index]].sort((a, b) => data.sample[a] - data.sample[b]);
    const where = group.iteration === null ? group.stage : `iteration ${group.iteration}`;
    const label = report.labels.length > 1 ? `${report.labels[group.run]}, ` : "";
    byId("group-title").textContent = `${rows.length} rollouts of one prompt, ${label}${where}`;
    const known = rows.map((row) => data.reward[row]).filter((reward) => reward !== null);
    const mean = known.reduce((sum, reward) => sum + reward, 0) / Math.max(known.length, 1);
    byId("group-facts").textContent = `${group.source || "dataset without name"}, prompt ${group.prompt_id}, mean reward ${shown(known.length ? mean : null)}`;
    byId("group-prompt").textContent = group.prompt;
    byId("group-answer").textContent = `Answer: ${group.answer}`;
    byId("group-rollouts").replaceChildren(...rows.map(articleOf));
    const names = [...new Set(rows.flatMap((row) => (data.tokens[row] ? Object.keys(data.tokens[row].values) : [])))];
    const select = byId("token-color");
    const chosen = names.includes(select.value) ? select.value : names.includes("advantage") ? "advantage" : "";
    select.replaceChildren(element("option", { value: "" }, "nothing"), ...names.map((name) => element("option", { value: name }, name)));
    select.value = chosen;
    byId("color-choice").hidden = names.length === 0;
    paint();
    if (!dialog.open) dialog.showModal();
    byId("group-title").focus();
    dialog.scrollTop = 0;
  };

  report.openGroup = (run, iteration, id) => {
    const index = openable.get(keyOf(run, iteration, id));
    if (index !== undefined) open(index);
  };

  report.showIteration = (iteration) => {
    const iterations = [...new Set(data.groups.map((group) => group.iteration))].filter((i) => i !== null);
    if (!iterations.length) return;
    const nearest = iterations.reduce((best, i) => (Math.abs(i - iteration) < Math.abs(best - iteration) ? i : best));
    byId("filters").reset();
    byId("filter-iteration-low").value = byId("filter-iteration-high").value = nearest;
    filter();
    byId("rollouts").scrollIntoView();
    byId("filter-iteration-low").focus({ preventScroll: true });
  };

  if (number) {
    const distinct = (values) => [...new Set(values)].map((entry) => [entry, entry || "(without name)"]);
    choices("run", [...new Set(data.groups.map((group) => group.run))].map((run) => [run, report.labels[run]]));
    choices("stage", distinct(data.groups.map((group) => group.stage)));
    choices("source", distinct(data.groups.map((group) => group.source)));
    choices("state", [["finished", "finished"], ...distinct(data.state.filter((state) => state))]);
    byId("rollouts").hidden = false;
    report.navigation.append(element("li", {}, element("a", { href: "#rollouts-title" }, "Rollouts")));
    for (const field of fields) byId(`filter-${field}`).addEventListener("input", filter);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(filter));
    byId("page-before").addEventListener("click", () => { first -= size; show(); });
    byId("page-after").addEventListener("click", () => { first += size; show(); });
    byId("token-color").addEventListener("change", paint);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => current !== null && paint());
    filter();
    (window.requestIdleCallback || setTimeout)(lowerTexts);
  }
  report.start.forEach((step) => step());
})();
