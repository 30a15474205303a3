/** The page around the view: toolbar, panels, foot. Builds it once and follows the Explorer; knows no rules of its own. */

import { COMMANDS, HELD, TOOLBAR, commandNamed } from "./commands.mjs";
import { button, check, el, numberField, place, segment, slider } from "./dom.mjs";
import { ICONS, icon } from "./icons.mjs";
import { INK, fitted } from "./overlay.mjs";
import * as maths from "./path.mjs";

/** Formats of camera files as the server names them, and their texts. */
const FORMATS = { npz: "saveNpz", "nerfstudio transforms.json": "saveTransforms", "colmap text": "saveColmap" };

const head = (words) => el("h3", { textContent: words });
const hint = (words) => el("p.hint", { textContent: words });
const row = (...parts) => el("div.row", {}, ...parts);

export class Panels {
    /** @param {object} x  the Explorer */
    constructor(x) {
        Object.assign(this, { x, t: x.t, buttons: [] });
        this.view = el("div.view");
        this.sink = el("input.sink", { readOnly: true, inputMode: "none", autocomplete: "off", "aria-label": this.t("view3d") });
        this.sink.setAttribute("data-capture-wheel", "true");
        this.still = el("canvas.still");
        this.drawn = el("canvas.drawn");
        this.photo = el("img.photo", { hidden: true, alt: "" });
        this.where = el("div.chip.where", { hidden: true });
        this.speed = el("div.chip.speed", { hidden: true });
        this.previewWords = el("div.words");
        this.live = el("img", { hidden: true, alt: "" });
        this.previewBox = el("div.box.preview", { hidden: true }, this.live, this.previewWords);
        this.mapCanvas = el("canvas", { title: this.t("map.tip") });
        this.mapBox = el("div.box.map", { hidden: true }, this.mapCanvas);
        this.message = el("div.message");
        this.notice = el("div.notice", { hidden: true });
        this.view.append(this.still, this.photo, this.drawn, this.sink, this.where, this.speed, this.mapBox, this.previewBox, this.message, this.notice);
        this.panel = el("div.panel", { hidden: true });
        this.help = el("div.help", { hidden: true });
        this.body = el("div.lyra2", {}, this.toolbar(), el("div.middle", {}, this.view, this.panel, this.help), this.foot());
        this.message.append(el("p", { textContent: this.t("loading") }));
    }

    // ------------------------------------------------------------------------------------------------------ buttons

    /** The button of a command, with its tooltip and key. */
    commandButton(id, options = {}) {
        const command = commandNamed(id), name = options.icon ?? command.icon ?? id;
        const words = this.t(`${id}.tip`);
        const made = button({
            label: this.t(id), title: `${words} (${command.keys})`, run: () => this.x.run(command),
            icon: ICONS.includes(name) ? icon(name) : null, ...options,
        });
        this.buttons.push({ button: made, command });
        return made;
    }

    /** A button of its own, not in the table of commands. */
    action(id, run, options = {}) {
        return button({ label: this.t(id), title: this.t(`${id}.tip`), icon: null, text: true, ...options, run });
    }

    toolbar() {
        const bar = el("div.bar", { role: "toolbar" });
        let push = false;
        for (const id of TOOLBAR) {
            if (id === ">") push = true;
            else if (id === "|") bar.append(el("span.gap"));
            else {
                const made = this.commandButton(id);
                if (push) made.classList.add("push");
                push = false;
                bar.append(made);
            }
        }
        return bar;
    }

    foot() {
        this.stripCanvas = el("canvas");
        this.strip = el("input", {
            type: "range", min: 0, max: 80, step: 1, value: 0, title: this.t("strip.tip"), "aria-label": this.t("strip"),
            oninput: () => this.x.scrubTo(Number(this.strip.value)),
        });
        this.frame = el("span.frame");
        this.status = el("div.status", { role: "status" });
        this.chunkText = el("b");
        this.stepper = el("div.stepper", { title: this.t("chunks.tip") },
            button({ label: this.t("fewer"), icon: icon("minus"), run: () => this.x.changeChunks(-1) }), this.chunkText,
            button({ label: this.t("more"), icon: icon("plus"), run: () => this.x.changeChunks(1) }));
        this.growButton = this.commandButton("grow", { text: true, classes: "primary" });
        this.stopButton = this.commandButton("stop", { text: true, classes: "danger" });
        this.rerollButton = this.commandButton("reroll", { text: true });
        this.backButton = this.commandButton("back", { text: true });
        this.bar = el("div");
        this.progress = el("div.progress", { hidden: true }, this.bar);
        return el("div.foot", {}, el("div.time", {}, this.commandButton("play"), el("div.strip", {}, this.stripCanvas, this.strip), this.frame),
            this.progress, el("div.growing", {}, this.status, el("div.doing", {}, this.stepper, this.backButton, this.rerollButton, this.stopButton, this.growButton)));
    }

    updateButtons() {
        const { x } = this;
        this.buttons = this.buttons.filter(({ button }) => button.isConnected || this.body.contains(button));
        for (const { button, command } of this.buttons) {
            button.input.disabled = command.can ? !command.can(x) : false;
            if (!command.on) continue;
            const on = Boolean(command.on(x));
            button.classList.toggle(command.id === "record" ? "recording" : "on", on);
            button.input.setAttribute("aria-pressed", on);
        }
    }

    // --------------------------------------------------------------------------------------------------------- foot

    update() {
        const { x, t } = this, { grow } = x;
        this.updateButtons();
        this.stepper.hidden = grow.busy || !x.standing;
        this.chunkText.textContent = t(x.chunks === 1 ? "chunk" : "chunks", { n: x.chunks });
        this.growButton.hidden = grow.busy;
        this.stopButton.hidden = !grow.busy;
        const after = grow.state === "done" || x.narrow === false;
        this.rerollButton.hidden = grow.busy || !after || !x.canReroll();
        this.backButton.hidden = grow.busy || !after || !x.canStepBack();
        this.growButton.querySelector("span").textContent = t(grow.state === "failed" ? "retry" : x.risky() ? "growAnyway" : "grow");
        this.strip.max = Math.max(1, x.poses.length - 1);
        this.strip.disabled = x.poses.length < 2;
        this.strip.value = x.scrub;
        this.frame.textContent = x.poses.length > 1 ? `${x.scrub} / ${x.poses.length - 1}` : "";
        this.updateStatus();
        this.updateProgress();
        this.updatePreview();
        if (this.panelFields) this.panelFields();
    }

    mark(kind, words, title = "") {
        return el(`span.mark.${kind}`, { textContent: words, title });
    }

    updateStatus() {
        const { x, t } = this, { grow } = x, marks = [];
        if (grow.busy || grow.state === "failed" || grow.state === "done") marks.push(this.mark(grow.state === "failed" ? "poor" : "plain", this.growWords()));
        else if (!x.standing) marks.push(this.mark("plain", x.world ? t("loading") : ""));
        else if (!x.plan.keys.length) marks.push(this.mark("plain", t("noKeys")));
        else marks.push(...this.preflightMarks());
        this.status.replaceChildren(...marks);
    }

    preflightMarks() {
        const { x, t } = this, { live } = x, marks = [];
        if (!live) return marks;
        const numbers = { coverage: Math.round(100 * live.least), clearance: (live.nearest / x.depth).toFixed(2), effort: live.effort.toFixed(1) };
        for (const [name, n] of Object.entries(numbers)) {
            const kind = live[`${name}Mark`];
            marks.push(this.mark(kind, t(name, { n }), t(`${name}.${kind}`)));
        }
        const seconds = x.chunkSeconds();
        marks.push(this.mark("plain", seconds ? t("takes", { time: duration(seconds * x.chunks, t) }) : t("takesUnknown")));
        if (x.settled?.retrieved) marks.push(this.mark("plain", t("retrieved", { n: new Set(x.settled.retrieved.flat()).size })));
        if (x.freeMemory) marks.push(this.mark("plain", t("freeMemory", { n: (x.freeMemory / 2 ** 30).toFixed(1) })));
        const advice = ["clearance", "coverage", "effort"].find((name) => live[`${name}Mark`] === "poor");
        if (advice) marks.push(el("span.advice", { textContent: t(`${advice}.poor`) }));
        return marks;
    }

    growWords() {
        const { x, t } = this, { grow } = x, { progress, problem } = grow;
        if (grow.state === "asking") return t("asking");
        if (grow.state === "waiting") return progress.before ? t("waiting", { n: progress.before }) : t("waitingFirst");
        if (grow.state === "done") return t("done");
        if (grow.state === "failed") return problem?.text === "rejected" ? t("rejected") : t("failed", { node: x.nodeName(problem?.node), text: problem?.text ?? "" });
        if (grow.kind === "begin") return t("beginning");
        const left = grow.secondsLeft();
        const words = [t("chunkOf", { i: Math.min(progress.chunk + 1, progress.chunks), n: progress.chunks })];
        if (progress.stage) words.push(t(`stage.${progress.stage}`));
        if (progress.steps > 1) words.push(t("step", { i: progress.step, n: progress.steps }));
        if (left !== null) words.push(t("left", { time: duration(left, t) }));
        return words.join(" · ");
    }

    updateProgress() {
        const { grow } = this.x, { chunk, chunks, share = 0, whole } = grow.progress;
        this.progress.hidden = !grow.busy;
        const done = grow.state === "running" ? (whole ? share : (chunk + share) / chunks) : 0;
        this.bar.style.width = `${Math.round(100 * Math.min(1, done))}%`;
    }

    /** Coverage of the plan's views as cells, the keys above, the playhead. */
    drawStrip() {
        const { x } = this, { context, width, height } = fitted(this.stripCanvas);
        const last = Math.max(1, x.poses.length - 1), cells = x.live?.marks ?? [], top = 9, tall = height - top - 3;
        context.fillStyle = "rgba(128,132,142,.22)";
        context.beginPath();
        context.roundRect(0, top, width, tall, 4);
        context.fill();
        cells.forEach((mark, i) => {
            const gap = cells.length > 60 ? 0.5 : 1.5, wide = width / cells.length;
            context.fillStyle = INK[mark];
            context.beginPath();
            context.roundRect(i * wide + gap / 2, top, wide - gap, tall, 2.5);
            context.fill();
        });
        if (x.poses.length < 2) return;
        context.fillStyle = "rgba(18,19,22,.6)";
        for (let frame = x.chunkFrames; frame < last; frame += x.chunkFrames) context.fillRect((frame / last) * width - 0.75, top, 1.5, tall);
        x.keyFrames().forEach((frame, i) => {
            context.beginPath();
            context.arc(4 + (frame / last) * (width - 8), 4, i === x.selected ? 3.6 : 2.8, 0, 7);
            context.fillStyle = i === x.selected ? INK.selected : getComputedStyle(this.body).color;
            context.fill();
        });
        const at = Math.max(1.5, Math.min(width - 1.5, (x.scrub / last) * width));
        context.fillStyle = getComputedStyle(this.body).color;
        context.fillRect(at - 1, top - 3, 2, tall + 6);
    }

    // ----------------------------------------------------------------------------------------------- over the view

    updatePreview() {
        const { x, t } = this, { grow } = x;
        const box = x.previewRect();
        this.previewBox.hidden = !box;
        if (!box) return;
        place(this.previewBox, { width: box[2] + 2, height: box[3] + 2 });
        const picture = grow.picture;
        this.live.hidden = !picture;
        if (picture && this.live.src !== picture) this.live.src = picture;
        if (!picture) this.live.removeAttribute("src");
        const known = x.coverageAt(x.scrub);
        if (picture) this.previewWords.textContent = grow.progress.stage === "sample" ? t("firstFrame") : t("nowMade");
        else this.previewWords.textContent = x.poses.length > 1 ? t("previewFrame", { i: x.scrub, n: known === null ? "–" : Math.round(100 * known) }) : t("previewHere");
    }

    updateChips() {
        const { x, t } = this;
        this.where.hidden = !x.world;
        if (x.world) this.where.textContent = `${x.folder} · ${x.world.chain.length === 1 ? t("theStart") : t("afterChunks", { n: x.world.chain.length - 1 })}`;
        this.speed.hidden = !x.standing;
        const speed = x.flight.speed;
        this.speed.textContent = `${x.recording ? `● ${t("recording")} · ` : ""}× ${speed >= 1 ? Number(speed.toFixed(1)) : speed.toFixed(2)}`;
    }

    /** In the middle of the view, instead of the world: what is missing and what to do. Null shows the world. */
    setMessage(head, words, actions = []) {
        this.message.hidden = head === null;
        if (head === null) return this.message.replaceChildren();
        this.message.replaceChildren(el("b", { textContent: head }), el("p", { textContent: words ?? "" }), ...(actions.length ? [row(...actions)] : []));
    }

    setNotice(words, { bad = false, actions = [] } = {}) {
        this.notice.hidden = !words;
        this.notice.classList.toggle("bad", bad);
        this.notice.replaceChildren();
        if (!words) return;
        const close = button({ label: this.t("dismiss"), icon: icon("close"), run: () => this.setNotice(null) });
        this.notice.append(el("span", { textContent: words }), ...actions, close);
    }

    // -------------------------------------------------------------------------------------------------------- panels

    showPanel(name) {
        this.panel.hidden = !name;
        this.panelFields = null;
        if (!name) return this.panel.replaceChildren();
        const build = { key: "keyPanel", path: "pathPanel", history: "historyPanel", view: "viewPanel" }[name];
        this.panel.replaceChildren(...this[build]());
        this.panel.scrollTop = 0;
        this.panelFields?.();
        this.updateButtons();
    }

    field(id, options) {
        return numberField({ label: this.t(id), title: this.t(`${id}.tip`), leave: () => this.x.focusView(), ...options });
    }

    keyPanel() {
        const { x, t } = this;
        const heading = el("h3"), step = 0.02 * x.depth;
        const places = ["x", "y", "z"].map((id, i) => this.field(id, {
            step, onchange: (value) => x.editPose((pose) => ({ ...pose, T: pose.T.map((old, k) => (k === i ? value : old)) })), oncommit: () => x.commitSoon(),
        }));
        const turns = ["yaw", "pitch", "roll"].map((id, i) => this.field(id, {
            step: 1, digits: 2, oncommit: () => x.commitSoon(),
            onchange: (value) => x.editPose((pose) => {
                const angles = maths.toAngles(pose.R);
                angles[i] = value;
                return { ...pose, R: maths.fromAngles(...angles) };
            }),
        }));
        const millimetres = () => x.settings.millimetres, ratio = () => x.aspect;
        const fov = this.field("fov", {
            step: 0.5, digits: 2, low: 1, high: 1000, oncommit: () => x.commitSoon(),
            onchange: (value) => x.editPose((pose) => ({ ...pose, fov: Math.min(170, Math.max(1, millimetres() ? maths.fovOf(value, ratio()) : value)) })),
        });
        const unit = segment({ title: t("unit"), options: [["degrees", "°"], ["millimetres", "mm"]], onchange: (value) => x.set("millimetres", value === "millimetres") });
        const everyFov = this.action("fovToAll", () => x.fovToAll());
        const place = segment({ title: t("space"), options: [["world", t("world")], ["local", t("local")]], onchange: (value) => x.setSpace(value) });
        this.panelFields = () => {
            const { pose, index } = x.edited();
            heading.textContent = index < 0 ? t("thisView") : t("keyOf", { i: index + 1, n: x.plan.keys.length });
            places.forEach((field, i) => field.show(pose.T[i]));
            maths.toAngles(pose.R).forEach((value, i) => turns[i].show(value));
            fov.show(millimetres() ? maths.mmOf(pose.fov, ratio()) : pose.fov);
            unit.show(millimetres() ? "millimetres" : "degrees");
            place.show(x.space);
            everyFov.input.disabled = !x.plan.keys.length;
        };
        return [heading, el("div.grid", {}, ...places, ...turns), head(t("lens")), row(fov, unit), row(everyFov),
            head(t("thisKey")),
            row(this.commandButton("previous"), this.commandButton("next"), this.commandButton("setKey"), this.commandButton("duplicate"), this.commandButton("remove")),
            row(this.commandButton("move", { text: true }), this.commandButton("turn", { text: true }), place),
            hint(t("keyHint"))];
    }

    pathPanel() {
        const { x, t } = this;
        const curve = segment({ title: t("curve"), options: maths.CURVES.map((name) => [name, t(`curve.${name}`)]), onchange: (value) => x.commit({ ...x.plan, curve: value }) });
        const motion = segment({ title: t("motion"), options: maths.MOTIONS.map((name) => [name, t(`motion.${name}`)]), onchange: (value) => x.commit({ ...x.plan, motion: value }) });
        const seed = this.field("seed", { step: 1, digits: 0, low: 0, high: Number.MAX_SAFE_INTEGER, onchange: (value) => x.preview({ ...x.plan, seed: Math.round(value) }), oncommit: () => x.commitSoon() });
        const starts = Object.keys(maths.STARTS).map((name) => button({ label: t(`start.${name}`), title: t("start.tip"), text: true, run: () => x.useStart(name) }));
        const change = {};
        const wholes = [["dx", 0], ["dy", 1], ["dz", 2]].map(([id, i]) => this.field(id, { step: 0.02 * x.depth, onchange: (value) => (change.move[i] = value) }))
            .concat([this.field("turnBy", { step: 1, onchange: (value) => (change.yaw = value) }), this.field("tiltBy", { step: 1, onchange: (value) => (change.pitch = value) }),
                this.field("scaleBy", { step: 0.05, low: 0.01, high: 100, onchange: (value) => (change.scale = value) })]);
        const clear = () => {
            Object.assign(change, { move: [0, 0, 0], yaw: 0, pitch: 0, scale: 1 });
            wholes.forEach((field, i) => field.show(i === 5 ? 1 : 0));
        };
        clear();
        const apply = this.action("apply", () => {
            x.transformPath(change);
            clear();
        });
        const captions = this.captions(), presets = this.presets();
        const saves = [["", "save"], ...Object.entries(FORMATS)].map(([format, id]) => button({ label: t(id), title: t("save.tip"), text: true, run: () => x.saveFile(format) }));
        const whole = [apply, this.action("reverse", () => x.reversePath(), { icon: icon("reverse") }), this.action("thereAndBack", () => x.thereAndBack()), this.action("clear", () => x.clearPath())];
        this.panelFields = () => {
            curve.show(x.plan.curve);
            motion.show(x.plan.motion);
            seed.show(x.plan.seed);
            captions.show();
            [...whole, ...wholes].forEach((part) => (part.input.disabled = !x.plan.keys.length));
            [...starts, ...saves].forEach((part) => (part.input.disabled = !x.standing));
        };
        return [head(t("curve")), curve, head(t("motion")), motion,
            head(t("content")), captions, row(seed),
            head(t("starts")), row(...starts), presets,
            head(t("whole")), el("div.grid", {}, ...wholes), row(...whole),
            head(t("file")), row(this.action("load", () => x.loadFile(), { icon: icon("load") }), ...saves),
            hint(t("fileHint"))];
    }

    /** The pack's presets, asked of the server when they are wanted. */
    presets() {
        const { x, t } = this, list = el("div.row"), body = el("div", { hidden: true });
        let direction = "right", strength = null;
        const way = segment({ title: t("direction"), options: ["left", "right", "up", "down"].map((name) => [name, t(`direction.${name}`)]), onchange: (value) => (direction = value) });
        const much = this.field("strength", { step: 0.05, low: 0, high: 1000, onchange: (value) => (strength = value) });
        way.show(direction);
        const open = this.action("allPresets", async () => {
            body.hidden = !body.hidden;
            if (list.childElementCount) return;
            await x.said(async () => {
                const found = await x.presets();
                list.replaceChildren(...found.map((preset) => button({
                    label: preset.name.replaceAll("_", " "), title: preset.note || t("start.tip"), text: true,
                    run: () => x.usePreset(preset.name, direction, strength ?? preset.strength?.default ?? 0),
                })));
            });
        });
        body.append(way, row(much), list);
        return el("div", {}, row(open), body);
    }

    /** What new parts show, chunk by chunk. */
    captions() {
        const { x, t } = this;
        let chunk = 0;
        const area = el("textarea", { placeholder: t("caption.empty"), "aria-label": t("content"), spellcheck: false });
        const which = el("b"), row = el("div.stepper", {}, button({ label: t("previousChunk"), icon: icon("previous"), run: () => go(-1) }), which,
            button({ label: t("nextChunk"), icon: icon("next"), run: () => go(1) }));
        const frame = () => (chunk ? String(1 + x.chunkFrames * chunk) : "0");
        const show = () => {
            chunk = Math.min(chunk, x.chunks - 1);
            row.hidden = x.chunks < 2;
            which.textContent = t("chunkOf", { i: chunk + 1, n: x.chunks });
            if (document.activeElement !== area) area.value = x.plan.captions[frame()] ?? "";
        };
        const go = (by) => {
            chunk = Math.max(0, Math.min(x.chunks - 1, chunk + by));
            area.blur();
            show();
        };
        area.addEventListener("change", () => {
            const captions = { ...x.plan.captions, [frame()]: area.value };
            if (!area.value.trim()) delete captions[frame()];
            x.commit({ ...x.plan, captions });
        });
        const element = el("div", {}, row, area);
        element.show = show;
        return element;
    }

    historyPanel() {
        const { x, t } = this;
        const tree = el("div.tree"), frames = slider({ label: t("madeFrames"), title: t("madeFrames.tip"), min: 0, max: 1, step: 1, oninput: (frame) => x.snapTo(frame), format: (n) => String(n) });
        let shown = null;
        this.panelFields = () => {
            const last = Math.max(1, x.past.length - 1);
            if (Number(frames.input.max) !== last) {
                frames.input.max = last;
                frames.show(x.past.length - 1);
            }
            frames.input.disabled = x.past.length < 1;
            const name = JSON.stringify([x.world?.state, x.world?.tree?.length]);
            if (name !== shown) tree.replaceChildren(...this.states());
            shown = name;
        };
        return [head(t("history")), tree, row(this.commandButton("back", { text: true }), this.commandButton("reroll", { text: true })),
            head(t("snap")), frames, hint(t("snapHint"))];
    }

    /** Every state of the folder, each under its parent, indented where the walk branched. */
    states() {
        const { x, t } = this;
        if (!x.world) return [];
        const children = new Map();
        for (const state of x.world.tree) children.set(state.parent, [...(children.get(state.parent) ?? []), state]);
        const rows = [], chain = new Set(x.world.chain);
        const walk = (state, depth, number) => {
            const here = state.state === x.world.state;
            const input = el("input", {
                type: "button", title: t("stand.tip"), "aria-label": `${t("stand")} ${state.state.slice(0, 8)}`,
                onclick: () => x.standAt(state.state), onmousedown: (event) => event.preventDefault(),
            });
            const row = el("div.state", {}, el("img", { src: x.thumbnail(state), alt: "", loading: "lazy" }),
                el("div", {}, el("b", { textContent: state.parent ? t("chunkN", { n: number }) : t("theStart") }),
                    el("p", { textContent: state.prompt || state.generator || state.state.slice(0, 8), title: state.prompt ?? "" }),
                    el("p", { textContent: state.parent ? t("seedFrames", { seed: state.seed ?? "–", n: state.frames }) : state.state.slice(0, 8) })), input);
            row.style.marginLeft = `${Math.min(depth, 6) * 14}px`;
            row.classList.toggle("chain", chain.has(state.state));
            row.classList.toggle("here", here);
            rows.push(row);
            const next = children.get(state.state) ?? [];
            next.forEach((child) => walk(child, depth + (next.length > 1 ? 1 : 0), number + 1));
        };
        (children.get(null) ?? children.get("") ?? []).forEach((state) => walk(state, 0, 0));
        return rows;
    }

    viewPanel() {
        const { x, t } = this, parts = [];
        const add = (part, value) => parts.push([part, value]) && part;
        const toggles = ["preview", "map", "cameras", "tint", "splats"].map((name) => add(
            check({ label: t(name), title: `${t(`${name}.tip`)} (${commandNamed(name).keys})`, onchange: () => x.toggle(name) }), () => x.settings[name]));
        const speed = add(slider({ label: t("speed"), min: -4, max: 6, step: 0.25, format: (v) => `× ${Number((2 ** v).toFixed(2))}`, oninput: (v) => x.changeSpeed(2 ** v / x.flight.speed) }), () => Math.log2(x.flight.speed));
        const size = add(slider({ label: t("pointSize"), min: 0.25, max: 3, step: 0.05, format: (v) => `× ${v}`, oninput: (v) => x.set("pointSize", v) }), () => x.settings.pointSize);
        const budget = add(slider({ label: t("budget"), min: 50_000, max: 2_000_000, step: 50_000, format: (v) => `${Math.round(v / 1000)} k`, oninput: (v) => x.set("budget", v) }), () => x.settings.budget);
        const from = add(slider({ label: t("sourcesFrom"), min: 0, max: 1, step: 1, oninput: (v) => x.setSources(v, x.sources[1]) }), () => Math.max(0, x.sources[0]));
        const to = add(slider({ label: t("sourcesTo"), min: 0, max: 1, step: 1, oninput: (v) => x.setSources(x.sources[0], v) }), () => Math.min(x.past.length - 1, x.sources[1]));
        const drawn = el("p.hint");
        this.panelFields = () => {
            from.input.max = to.input.max = Math.max(1, x.past.length - 1);
            parts.forEach(([part, value]) => part.show(value()));
            drawn.textContent = t("drawn", { n: x.stage ? x.stage.drawn.toLocaleString() : 0 });
        };
        return [head(t("viewHead")), ...toggles, speed, size, budget, drawn, head(t("sources")), from, to];
    }

    // ---------------------------------------------------------------------------------------------------------- help

    showHelp(shown) {
        this.help.hidden = !shown;
        if (!shown) return this.help.replaceChildren();
        const { t } = this;
        const line = (words, keys) => el("p", {}, el("span", { textContent: words }), el("kbd", { textContent: keys }));
        const held = el("section", {}, head(t("group.moving")), ...HELD.map(([id, keys]) => line(t(`held.${id}`), keys === "mouse" ? t(`mouse.${id}`) : keys)));
        const groups = [...new Set(COMMANDS.map(({ group }) => group))].map((group) => el("section", {}, head(t(`group.${group}`)),
            ...COMMANDS.filter((command) => command.group === group).map((command) => line(t(command.id), command.keys))));
        this.help.replaceChildren(held, ...groups);
    }

    close() {
        this.body.replaceChildren();
        this.body.remove();
        this.buttons = [];
        this.panelFields = null;
        this.x = null;
    }
}

/** Seconds in words: "40 s", "3 min", "1.5 h". */
export function duration(seconds, t) {
    if (seconds < 90) return t("seconds", { n: Math.max(1, Math.round(seconds)) });
    if (seconds < 5400) return t("minutes", { n: Math.round(seconds / 60) });
    return t("hours", { n: (seconds / 3600).toFixed(1) });
}
