/** Small parts of the page. Every control is an <input>: the host then leaves its keys alone, its graph undo among them. */

/** An element with properties, classes in `tag` ("div.row.wide") and children; texts are never read as HTML. */
export function el(tag, properties = {}, ...children) {
    const [name, ...classes] = tag.split(".");
    const element = document.createElement(name);
    element.classList.add(...classes);
    for (const [key, value] of Object.entries(properties)) {
        if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
        else if (key.startsWith("aria-") || key === "for") element.setAttribute(key, value);
        else element[key] = value;
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
}

/** Sets lengths of an element's style, in pixels. */
export function place(element, lengths) {
    for (const [name, value] of Object.entries(lengths)) element.style[name] = `${value}px`;
}

/** A push button: a label and an icon below a transparent <input type=button>. */
export function button({ label, title = label, icon = null, text = false, classes = "", run }) {
    // the view keeps the focus, so that keys go on working
    const input = el("input", { type: "button", title, "aria-label": label, onclick: run, onmousedown: (event) => event.preventDefault() });
    const element = el("span.button", {}, icon, text ? el("span", { textContent: label }) : null, input);
    if (text) element.classList.add("text");
    if (classes) element.classList.add(...classes.split(" "));
    element.input = input;
    return element;
}

/** A number that is typed, stepped with the arrow keys, or scrubbed at its label. */
export function numberField({ label, title, step = 0.1, digits = 3, low = -Infinity, high = Infinity, onchange, oncommit, leave }) {
    const input = el("input", { type: "text", inputMode: "decimal", autocomplete: "off", spellcheck: false, title, "aria-label": title ?? label });
    const handle = el("label", { textContent: label, title });
    const element = el("div.field", {}, handle, input);
    const show = (value) => (input.value = Number.isFinite(value) ? String(Number(value.toFixed(digits))) : "");
    const clamp = (value) => Math.min(high, Math.max(low, value));
    const change = (value) => {
        value = clamp(value);
        element.value = value;
        show(value);
        onchange?.(value);
    };
    const typed = () => {
        const value = Number(input.value.replace(",", ".").trim() || NaN);
        if (!Number.isFinite(value)) return show(element.value);
        if (Math.abs(value - element.value) > 0.5 * 10 ** -digits) {
            change(value);
            oncommit?.();
        }
    };
    input.addEventListener("change", typed);
    input.addEventListener("keydown", (event) => {
        if (event.key === "ArrowUp" || event.key === "ArrowDown") {
            event.preventDefault();
            change(element.value + (event.key === "ArrowUp" ? 1 : -1) * step * (event.shiftKey ? 10 : 1));
            oncommit?.();
        } else if (event.key === "Enter") {
            typed();
            leave?.();
        } else if (event.key === "Escape") {
            show(element.value);
            leave?.();
        }
    });
    scrub(handle, (pixels, event) => change(element.value + pixels * step * 0.25 * (event.shiftKey ? 10 : 1)), () => oncommit?.());
    element.show = (value) => {
        element.value = value;
        if (document.activeElement !== input) show(value);
    };
    element.input = input;
    return element;
}

/** Calls `move` with pixels dragged sideways and `end` once. */
function scrub(handle, move, end) {
    let last = null, moved = false;
    handle.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        last = event.clientX;
        moved = false;
        capture(handle, event.pointerId);
    });
    handle.addEventListener("pointermove", (event) => {
        if (last === null || event.clientX === last) return;
        moved = true;
        move(event.clientX - last, event);
        last = event.clientX;
    });
    const stop = () => {
        if (last !== null && moved) end();
        last = null;
    };
    handle.addEventListener("pointerup", stop);
    handle.addEventListener("pointercancel", stop);
}

/** setPointerCapture throws while the pointer is locked or gone. */
export function capture(element, pointer) {
    try {
        element.setPointerCapture(pointer);
    } catch { /* the drag works without, as long as it stays inside */ }
}

let groups = 0;

/** One of several: [value, label] pairs as radio buttons. */
export function segment({ title, options, onchange }) {
    const name = `lyra2-segment-${groups++}`;
    const inputs = options.map(([value]) => el("input", { type: "radio", name, value, onchange: () => onchange(value) }));
    const element = el("div.segment", { role: "radiogroup", title, "aria-label": title }, ...options.map(([, label], i) => el("label", { textContent: label }, inputs[i])));
    element.show = (value) => inputs.forEach((input) => (input.checked = input.value === String(value)));
    return element;
}

export function slider({ label, title = label, min, max, step, format = String, oninput, onchange }) {
    const input = el("input", { type: "range", min, max, step, title, "aria-label": title });
    const value = el("span");
    const show = (number) => {
        input.value = number;
        value.textContent = format(Number(number));
    };
    input.addEventListener("input", () => {
        value.textContent = format(Number(input.value));
        oninput?.(Number(input.value));
    });
    input.addEventListener("change", () => onchange?.(Number(input.value)));
    const element = el("div.slider", {}, el("span", { textContent: label }), value, input);
    element.show = show;
    element.input = input;
    return element;
}

export function check({ label, title = label, onchange }) {
    const input = el("input", { type: "checkbox", title, onchange: () => onchange(input.checked) });
    const element = el("label.check", { title }, input, el("span", { textContent: label }));
    element.show = (value) => (input.checked = value);
    return element;
}
