/** Everything that can be done, once: the toolbar, the keys, the help page and the docs are made of this table. */

/**
 * @typedef {object} Command
 * @property {string} id  also of its text, its tooltip and its icon
 * @property {string} group  of the help page
 * @property {string[]} codes  KeyboardEvent.code; "Shift+" in front where Shift has to be held, "Ctrl+" likewise (by letter, not code)
 * @property {string} keys  as they are shown
 * @property {(x: object) => void} run
 * @property {(x: object) => boolean} [can]
 * @property {(x: object) => boolean} [on]
 */

const selected = (x) => x.selected >= 0;
const planned = (x) => x.plan.keys.length > 0;
const stands = (x) => Boolean(x.standing);
const switches = (setting) => ({ run: (x) => x.toggle(setting), on: (x) => x.settings[setting] });
const shows = (panel) => ({ run: (x) => x.togglePanel(panel), on: (x) => x.panel === panel });

/** @type {Command[]} */
export const COMMANDS = [
    { id: "home", group: "view", codes: ["Home"], keys: "Home", run: (x) => x.goHome(), can: stands },
    { id: "photo", group: "view", codes: ["Shift+Home"], keys: "Shift Home", icon: "begin", run: (x) => x.goToPhoto(), can: stands },
    { id: "orbit", group: "view", codes: ["KeyO"], keys: "O", run: (x) => x.toggleOrbit(), on: (x) => Boolean(x.flight.pivot), can: stands },
    { id: "slower", group: "view", codes: ["Minus", "NumpadSubtract"], keys: "−", run: (x) => x.changeSpeed(1 / 1.25) },
    { id: "faster", group: "view", codes: ["Equal", "NumpadAdd"], keys: "+", run: (x) => x.changeSpeed(1.25) },
    { id: "addKey", group: "path", codes: ["KeyK", "Enter"], keys: "K, Enter", icon: "key", run: (x) => x.addKey(), can: stands },
    { id: "setKey", group: "path", codes: ["KeyU"], keys: "U", icon: "set", run: (x) => x.setKeyToView(), can: selected },
    { id: "duplicate", group: "path", codes: ["KeyC"], keys: "C", run: (x) => x.duplicateKey(), can: selected },
    { id: "remove", group: "path", codes: ["Delete", "Backspace"], keys: "Delete", run: (x) => x.removeKey(), can: selected },
    { id: "previous", group: "path", codes: ["Comma"], keys: ",", run: (x) => x.selectNext(-1), can: planned },
    { id: "next", group: "path", codes: ["Period"], keys: ".", run: (x) => x.selectNext(1), can: planned },
    { id: "move", group: "path", codes: ["KeyG"], keys: "G", run: (x) => x.setGizmo("translate"), on: (x) => x.gizmo === "translate", can: selected },
    { id: "turn", group: "path", codes: ["KeyR"], keys: "R", run: (x) => x.setGizmo("rotate"), on: (x) => x.gizmo === "rotate", can: selected },
    { id: "space", group: "path", codes: ["KeyT"], keys: "T", run: (x) => x.toggleSpace(), on: (x) => x.space === "local", can: selected },
    { id: "undo", group: "path", codes: ["Ctrl+z"], keys: "Ctrl Z", run: (x) => x.undo(-1), can: (x) => x.history.at > 0 },
    { id: "redo", group: "path", codes: ["Ctrl+Shift+z", "Ctrl+y"], keys: "Ctrl Shift Z", run: (x) => x.undo(1), can: (x) => x.history.at < x.history.plans.length - 1 },
    { id: "record", group: "path", codes: ["KeyB"], keys: "B", run: (x) => x.toggleRecording(), on: (x) => Boolean(x.recording), can: stands },
    { id: "play", group: "watch", codes: ["Space"], keys: "Space", run: (x) => x.togglePlay(false), on: (x) => x.playing === "side", can: planned },
    { id: "along", group: "watch", codes: ["KeyL"], keys: "L", run: (x) => x.togglePlay(true), on: (x) => x.playing === "along", can: planned },
    { id: "earlier", group: "watch", codes: ["BracketLeft"], keys: "[", run: (x) => x.scrubBy(-8), can: planned },
    { id: "later", group: "watch", codes: ["BracketRight"], keys: "]", run: (x) => x.scrubBy(8), can: planned },
    { id: "grow", group: "grow", codes: ["Shift+Enter"], keys: "Shift Enter", run: (x) => x.startGrowing(), can: (x) => planned(x) && !x.grow.busy },
    { id: "stop", group: "grow", codes: ["Shift+KeyX"], keys: "Shift X", run: (x) => x.grow.stop(), can: (x) => x.grow.busy },
    { id: "reroll", group: "grow", codes: ["Shift+KeyR"], keys: "Shift R", run: (x) => x.reroll(), can: (x) => x.canReroll() },
    { id: "back", group: "grow", codes: ["Shift+KeyB"], keys: "Shift B", run: (x) => x.stepBack(), can: (x) => x.canStepBack() },
    { id: "panelKey", group: "panels", codes: ["Digit1"], keys: "1", ...shows("key") },
    { id: "panelPath", group: "panels", codes: ["Digit2"], keys: "2", ...shows("path") },
    { id: "panelHistory", group: "panels", codes: ["Digit3"], keys: "3", ...shows("history") },
    { id: "panelView", group: "panels", codes: ["Digit4"], keys: "4", ...shows("view") },
    { id: "preview", group: "panels", codes: ["KeyV"], keys: "V", ...switches("preview") },
    { id: "map", group: "panels", codes: ["KeyM"], keys: "M", ...switches("map") },
    { id: "cameras", group: "panels", codes: ["KeyN"], keys: "N", ...switches("cameras") },
    { id: "tint", group: "panels", codes: ["KeyI"], keys: "I", ...switches("tint") },
    { id: "splats", group: "panels", codes: ["KeyJ"], keys: "J", ...switches("splats") },
    { id: "full", group: "panels", codes: ["KeyF"], keys: "F", run: (x) => x.toggleFull(), on: (x) => Boolean(x.overlay) },
    { id: "help", group: "panels", codes: ["KeyH", "F1"], keys: "H", run: (x) => x.toggleHelp(), on: (x) => x.helpShown },
    { id: "escape", group: "panels", codes: ["Escape"], keys: "Esc", run: (x) => x.escape() },
];

/** Keys that are held, and what only the mouse is quicker at: for the help page and the docs. */
export const HELD = [
    ["fly", "W A S D"], ["rise", "Q E"], ["look", "← → ↑ ↓"], ["fast", "Shift"], ["mouseLook", "mouse"], ["mousePan", "mouse"],
    ["mouseOrbit", "mouse"], ["wheel", "mouse"],
];

/** Of the toolbar, in order; "|" parts groups, ">" moves the rest to the right. */
export const TOOLBAR = [
    "home", "orbit", "|", "addKey", "setKey", "remove", "previous", "next", "|", "move", "turn", "space", "|", "undo", "redo", "|", "record", "along", ">",
    "panelKey", "panelPath", "panelHistory", "panelView", "|", "help", "full",
];

const BY_ID = new Map(COMMANDS.map((command) => [command.id, command]));
const BY_CODE = new Map(COMMANDS.flatMap((command) => command.codes.map((code) => [code, command])));

export const commandNamed = (id) => BY_ID.get(id);

/** The command of a key event, or undefined. */
export function commandOf(event) {
    const shift = event.shiftKey ? "Shift+" : "";
    if (event.ctrlKey || event.metaKey) return BY_CODE.get(`Ctrl+${shift}${event.key.toLowerCase()}`);
    if (event.altKey) return undefined;
    return BY_CODE.get(shift + event.code) ?? (shift && /^(Equal|Minus)$/.test(event.code) ? BY_CODE.get(event.code) : undefined);
}
