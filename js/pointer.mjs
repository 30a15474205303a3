/** Mouse, wheel and keys of one Explorer, kept away from the graph behind it. */

import { commandOf } from "./commands.mjs";
import { capture } from "./dom.mjs";
import { moves } from "./flight.mjs";
import { givesWheelToCanvas } from "./host.mjs";

const CLICK = 4;                // pixels that a click may slip
const STOPPED = ["pointerdown", "pointermove", "pointerup", "mousedown", "click", "dblclick", "contextmenu"];
const HELD_RECORDING = 400;     // milliseconds after which letting go of the key ends the recording

/** Listens until the signal aborts. */
export function listen(x, { body, view, sink, mapCanvas }, signal) {
    const on = (target, name, act, options = {}) => target.addEventListener(name, act, { signal, ...options });
    // mouseup goes on to the window: the host's undo waits for it there
    STOPPED.forEach((name) => on(body, name, (event) => event.stopPropagation()));
    on(body, "contextmenu", (event) => event.preventDefault());
    on(body, "wheel", (event) => wheel(x, event, sink), { passive: false });
    on(body, "keydown", (event) => keyDown(x, event, sink));
    on(body, "keyup", (event) => keyUp(x, event));
    on(body, "pointerdown", () => x.takeStage());
    on(sink, "blur", () => x.letGo());
    on(sink, "focus", () => x.takeStage());
    on(document, "visibilitychange", () => (document.hidden ? x.letGo() : x.comeBack()));
    listenToView(x, view, sink, on);
    listenToMap(x, mapCanvas, on);
}

function wheel(x, event, sink) {
    event.preventDefault();
    event.stopPropagation();
    const scrolled = event.target.closest?.(".panel, .help, .notice");
    if (scrolled) return void (scrolled.scrollTop += event.deltaY);
    if (!x.overlay && givesWheelToCanvas(x.app, event, sink)) return;
    const notches = -Math.sign(event.deltaY) * Math.min(3, Math.abs(event.deltaY) / 100 || 1);
    if (x.flight.pivot) {
        x.flight.dolly(notches);
        x.viewMoved();
    } else x.changeSpeed(1.15 ** notches);
}

const isText = (target) => target.matches?.("textarea, input[type=text]:not(.sink), input:not([type]):not(.sink)") && !target.readOnly;

/** Keys the host shall have whatever is focused: run, save, and the browser's own. */
const passes = (event) => (event.ctrlKey || event.metaKey) && ["Enter", "s"].includes(event.key) || (/^F\d+$/.test(event.key) && event.key !== "F1");

function keyDown(x, event, sink) {
    if (passes(event)) return;
    event.stopPropagation();
    if (event.isComposing || isText(event.target)) {
        if (event.key === "Escape" && event.target.matches("textarea")) x.focusView();
        return;
    }
    const command = commandOf(event), onSink = event.target === sink;
    // a focused button is pressed by these, a slider or a choice moved
    if (!onSink && ["Space", "Enter", "Tab"].includes(event.code) && !event.shiftKey) return;
    if (!onSink && /^(Arrow|Home|End|Page)/.test(event.code)) return;
    if (event.code === "Tab") return;
    if (!event.ctrlKey && !event.metaKey && !event.altKey && moves(event.code) && !(event.shiftKey && command)) {
        event.preventDefault();
        x.flight.fast = event.shiftKey;
        if (!event.repeat) x.hold(event.code);
        return;
    }
    if (event.key === "Shift") x.flight.fast = true;
    if (!command) return;
    event.preventDefault();
    if (command.id === "record" && !event.repeat) x.recordPressed = performance.now();
    if (event.repeat && !["earlier", "later", "slower", "faster", "undo", "redo"].includes(command.id)) return;
    x.run(command);
}

function keyUp(x, event) {
    event.stopPropagation();
    if (event.key === "Shift") x.flight.fast = false;
    x.flight.release(event.code);
    x.viewSettled();
    if (event.code === "KeyB" && x.recording && performance.now() - (x.recordPressed ?? 0) > HELD_RECORDING) x.toggleRecording();
}

/** Where an event is in an element, in the element's own pixels, however the graph is zoomed. */
function placeIn(element, event) {
    const rect = element.getBoundingClientRect(), by = element.clientWidth / Math.max(rect.width, 1);
    return [(event.clientX - rect.left) * by, (event.clientY - rect.top) * by];
}

function listenToView(x, view, sink, on) {
    let drag = null;
    const place = (event) => placeIn(view, event);
    on(sink, "pointerdown", (event) => {
        sink.focus({ preventScroll: true });
        if (x.stage?.gizmo?.axis && x.gizmoShown) return;  // its handles are dragged
        const at = place(event);
        drag = { button: event.button, at, first: at, key: x.keyAt(at), slipped: false };
        capture(sink, event.pointerId);
        sink.classList.add("dragging");
    });
    on(sink, "pointermove", (event) => {
        const at = place(event);
        if (!drag) return x.hover(x.keyAt(at));
        if (x.gizmoDragging) return void (drag = null);
        const dx = at[0] - drag.at[0], dy = at[1] - drag.at[1];
        drag.slipped ||= Math.hypot(at[0] - drag.first[0], at[1] - drag.first[1]) > CLICK;
        if (!drag.slipped) return;
        drag.at = at;
        const height = Math.max(view.clientHeight, 1), degrees = x.shownFov() / height;
        if (drag.button === 0) x.flight.look(dx * degrees, dy * degrees);
        else x.flight.pan(dx / height, dy / height);
        x.viewMoved();
    });
    const end = (event) => {
        sink.classList.remove("dragging");
        if (!drag) return;
        const { slipped, key, button } = drag;
        drag = null;
        if (slipped) x.viewSettled();
        else if (button === 0 && event.type === "pointerup") x.select(key);
    };
    on(sink, "pointerup", end);
    on(sink, "pointercancel", end);
    on(sink, "dblclick", (event) => x.orbitAt(place(event)));
}

function listenToMap(x, canvas, on) {
    let drag = null;
    const place = (event) => placeIn(canvas, event);
    on(canvas, "mousedown", (event) => event.preventDefault());
    on(canvas, "pointerdown", (event) => {
        x.focusView();
        const key = x.mapKeyAt(place(event));
        drag = { key };
        capture(canvas, event.pointerId);
        if (key < 0) x.goOnMap(place(event));
        else x.select(key);
    });
    on(canvas, "pointermove", (event) => {
        if (!drag) return;
        if (drag.key < 0) x.goOnMap(place(event));
        else x.dragOnMap(drag.key, place(event));
    });
    on(canvas, "pointerup", () => {
        if (drag?.key >= 0) x.commitSoon(0);
        else if (drag) x.viewSettled();
        drag = null;
    });
}
