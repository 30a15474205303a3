/** The look: the host's own colours around a dark view. One sheet for the page. */

const SHEET = `
.lyra2-root { display: flex; flex-direction: column; width: 100%; height: 100%; min-height: 300px; position: relative; }
.lyra2-away { margin: auto; color: var(--descrip-text, #999); font: 12px system-ui, sans-serif; }
.lyra2 {
    --lx-surface: var(--comfy-menu-bg, #26272c); --lx-field: var(--comfy-input-bg, #1d1e22); --lx-line: var(--border-color, #3a3c43);
    --lx-text: var(--input-text, #e4e5e9); --lx-quiet: var(--descrip-text, #9a9ca5); --lx-accent: #ffb454; --lx-on-accent: #221704;
    --lx-good: #5fbf7f; --lx-fair: #e8b04b; --lx-poor: #e5674f;
    flex: 1; min-height: 0; display: flex; flex-direction: column; overflow: hidden; border-radius: 8px; background: var(--lx-surface);
    color: var(--lx-text); font: 12px/1.35 system-ui, -apple-system, "Segoe UI", sans-serif; user-select: none; -webkit-user-select: none;
    cursor: default; text-align: start;
}
.lyra2 *, .lyra2 *::before { box-sizing: border-box; }
.lyra2 [hidden] { display: none !important; }
.lyra2-overlay { position: fixed; inset: 0; z-index: 2000; display: flex; background: #0d0e10; }
.lyra2-overlay .lyra2 { border-radius: 0; }

.lyra2 .bar { display: flex; align-items: center; gap: 0; padding: 4px 4px; flex-wrap: wrap; border-bottom: 1px solid var(--lx-line); }
.lyra2 .bar .gap { width: 1px; height: 16px; margin: 0 2px; background: var(--lx-line); }
.lyra2 .bar .push { margin-left: auto; }
.lyra2 .button {
    position: relative; display: inline-flex; align-items: center; justify-content: center; gap: 5px; min-width: 25px; height: 26px;
    padding: 0 4px; border-radius: 6px; color: var(--lx-text); white-space: nowrap; transition: background .12s, color .12s;
}
.lyra2 .button svg { width: 16px; height: 16px; flex: none; fill: none; stroke: currentColor; stroke-width: 1.4; stroke-linecap: round; stroke-linejoin: round; }
.lyra2 .button svg.filled { fill: currentColor; stroke-width: 1; }
.lyra2 .button input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: pointer; }
.lyra2 .button:has(input:hover:enabled) { background: color-mix(in srgb, var(--lx-text) 12%, transparent); }
.lyra2 .button:has(input:focus-visible), .lyra2 .segment label:has(input:focus-visible) { outline: 2px solid var(--lx-accent); outline-offset: -2px; }
.lyra2 .button:has(input:disabled) { opacity: .36; }
.lyra2 .button:has(input:disabled) input { cursor: default; }
.lyra2 .button.on { background: color-mix(in srgb, var(--lx-accent) 22%, transparent); color: var(--lx-accent); }
.lyra2 .button.text { padding: 0 9px; background: color-mix(in srgb, var(--lx-text) 9%, transparent); }
.lyra2 .button.primary { background: var(--lx-accent); color: var(--lx-on-accent); font-weight: 600; padding: 0 12px 0 9px; }
.lyra2 .button.primary:has(input:hover:enabled) { background: color-mix(in srgb, var(--lx-accent) 86%, white); }
.lyra2 .button.danger { background: color-mix(in srgb, var(--lx-poor) 26%, transparent); color: color-mix(in srgb, var(--lx-poor) 60%, white); }
.lyra2 .button.recording { color: var(--lx-poor); background: color-mix(in srgb, var(--lx-poor) 22%, transparent); }

.lyra2 .middle { flex: 1; min-height: 0; display: flex; position: relative; }
.lyra2 .view { flex: 1; min-width: 0; min-height: 0; position: relative; overflow: hidden; background: #15171b; }
.lyra2 .view canvas.lyra2-stage, .lyra2 .view .still, .lyra2 .view .drawn, .lyra2 .view .sink { position: absolute; inset: 0; width: 100% !important; height: 100% !important; }
.lyra2 .view .still { object-fit: fill; }
.lyra2 .view .drawn { pointer-events: none; }
.lyra2 .view .sink { opacity: 0; margin: 0; padding: 0; border: 0; touch-action: none; cursor: grab; caret-color: transparent; font-size: 16px; }
.lyra2 .view .sink.dragging { cursor: grabbing; }
.lyra2 .view .sink.over-key { cursor: pointer; }
.lyra2 .view:has(.sink:focus)::after { content: ""; position: absolute; inset: 0; pointer-events: none; box-shadow: inset 0 0 0 1.5px color-mix(in srgb, var(--lx-accent) 55%, transparent); }
.lyra2 .photo { position: absolute; pointer-events: none; object-fit: fill; transition: opacity .9s; }
.lyra2 .chip { position: absolute; padding: 2px 7px; border-radius: 6px; background: rgba(12,13,16,.66); color: #e8e9ee; font-size: 11px; pointer-events: none; }
.lyra2 .chip.where { left: 8px; top: 8px; }
.lyra2 .chip.speed { right: 8px; top: 8px; font-variant-numeric: tabular-nums; }
.lyra2 .box { position: absolute; border: 1px solid rgba(255,255,255,.22); border-radius: 6px; overflow: hidden; box-shadow: 0 4px 14px rgba(0,0,0,.35); }
.lyra2 .box.preview { right: 8px; bottom: 8px; pointer-events: none; }
.lyra2 .box.preview img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: cover; }
.lyra2 .box .words { position: absolute; left: 0; right: 0; bottom: 0; padding: 9px 6px 3px; font-size: 10.5px; color: #f1f1f4; background: linear-gradient(transparent, rgba(0,0,0,.72)); font-variant-numeric: tabular-nums; }
.lyra2 .box.map { left: 8px; bottom: 8px; background: rgba(14,15,18,.72); }
.lyra2 .box.map canvas { width: 100%; height: 100%; display: block; cursor: crosshair; }

.lyra2 .message { position: absolute; inset: 0; display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 12px; padding: 20px; text-align: center; color: #d9dbe1; pointer-events: none; background: radial-gradient(ellipse at 50% 40%, #23262d, #15171b 75%); }
.lyra2 .message .button { pointer-events: auto; }
.lyra2 .message b { font-size: 15px; font-weight: 600; }
.lyra2 .message p { margin: 0; max-width: 34em; color: #a7aab4; }
.lyra2 .notice { position: absolute; left: 50%; top: 36px; transform: translateX(-50%); max-width: calc(100% - 24px); display: flex; align-items: center; gap: 8px; padding: 6px 6px 6px 10px; border-radius: 8px; background: rgba(24,25,30,.93); color: #eceef2; border: 1px solid var(--lx-line); box-shadow: 0 4px 16px rgba(0,0,0,.4); }
.lyra2 .notice.bad { border-color: var(--lx-poor); }
.lyra2 .notice span { overflow-wrap: anywhere; user-select: text; max-height: 6.8em; overflow: auto; }

.lyra2 .panel { position: absolute; right: 0; top: 0; bottom: 0; width: min(248px, 62%); overflow: auto; padding: 8px 10px 12px; background: color-mix(in srgb, var(--lx-surface) 94%, transparent); border-left: 1px solid var(--lx-line); scrollbar-width: thin; overscroll-behavior: contain; }
.lyra2-overlay .lyra2 .panel { position: static; width: 300px; flex: none; padding: 10px 14px 16px; background: var(--lx-surface); }
.lyra2 .panel h3 { margin: 12px 0 5px; font-size: 11px; font-weight: 600; letter-spacing: .03em; color: var(--lx-quiet); }
.lyra2 .panel h3:first-child { margin-top: 0; }
.lyra2 .grid { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; }
.lyra2 .field { display: flex; align-items: center; gap: 4px; min-width: 0; height: 24px; padding: 0 6px; border-radius: 6px; background: var(--lx-field); border: 1px solid transparent; }
.lyra2 .field:focus-within { border-color: var(--lx-accent); }
.lyra2 .field label { color: var(--lx-quiet); cursor: ew-resize; white-space: nowrap; touch-action: none; font-size: 11px; }
.lyra2 .field input { flex: 1; min-width: 0; width: 100%; border: 0; outline: 0; background: none; color: var(--lx-text); font: inherit; text-align: right; font-variant-numeric: tabular-nums; padding: 0; }
.lyra2 .row { display: flex; align-items: center; gap: 5px; flex-wrap: wrap; margin: 4px 0; }
.lyra2 .row > .grow { flex: 1; }
.lyra2 .segment { display: flex; background: var(--lx-field); border-radius: 6px; padding: 2px; gap: 2px; }
.lyra2 .segment label { position: relative; flex: 1; text-align: center; padding: 2px 5px; border-radius: 5px; color: var(--lx-quiet); font-size: 11px; }
.lyra2 .segment label:has(input:checked) { background: color-mix(in srgb, var(--lx-text) 16%, transparent); color: var(--lx-text); }
.lyra2 .segment input { position: absolute; inset: 0; opacity: 0; margin: 0; width: 100%; height: 100%; cursor: pointer; }
.lyra2 .slider { display: grid; grid-template-columns: 1fr auto; gap: 1px 6px; margin: 6px 0; }
.lyra2 .slider input { grid-column: 1 / 3; width: 100%; margin: 0; accent-color: var(--lx-accent); }
.lyra2 .slider span:last-of-type { color: var(--lx-quiet); font-variant-numeric: tabular-nums; }
.lyra2 .check { display: flex; align-items: center; gap: 7px; padding: 3px 0; }
.lyra2 .check input { accent-color: var(--lx-accent); margin: 0; }
.lyra2 textarea { width: 100%; min-height: 54px; resize: vertical; border-radius: 6px; border: 1px solid transparent; background: var(--lx-field); color: var(--lx-text); font: inherit; padding: 5px 7px; outline: 0; user-select: text; }
.lyra2 textarea:focus { border-color: var(--lx-accent); }
.lyra2 .hint { color: var(--lx-quiet); font-size: 11px; margin: 3px 0; }

.lyra2 .tree { display: flex; flex-direction: column; gap: 3px; }
.lyra2 .state { position: relative; display: flex; gap: 8px; align-items: center; padding: 4px; border-radius: 7px; border: 1px solid transparent; }
.lyra2 .state:has(input:hover) { background: color-mix(in srgb, var(--lx-text) 8%, transparent); }
.lyra2 .state:has(input:focus-visible) { outline: 2px solid var(--lx-accent); outline-offset: -2px; }
.lyra2 .state.chain { background: color-mix(in srgb, var(--lx-text) 6%, transparent); }
.lyra2 .state.here { border-color: var(--lx-accent); background: color-mix(in srgb, var(--lx-accent) 13%, transparent); }
.lyra2 .state img { width: 58px; aspect-ratio: 16 / 10; object-fit: cover; border-radius: 4px; background: #111; flex: none; }
.lyra2 .state div { min-width: 0; flex: 1; }
.lyra2 .state b { font-weight: 600; }
.lyra2 .state p { margin: 0; color: var(--lx-quiet); font-size: 11px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.lyra2 .state input { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0; margin: 0; cursor: pointer; }

.lyra2 .foot { border-top: 1px solid var(--lx-line); padding: 5px 8px 7px; display: flex; flex-direction: column; gap: 5px; }
.lyra2 .time { display: flex; align-items: center; gap: 6px; }
.lyra2 .strip { position: relative; flex: 1; height: 26px; min-width: 0; }
.lyra2 .strip canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.lyra2 .strip input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: col-resize; }
.lyra2 .strip:has(input:focus-visible) { outline: 2px solid var(--lx-accent); border-radius: 4px; }
.lyra2 .time .frame { min-width: 58px; text-align: right; color: var(--lx-quiet); font-variant-numeric: tabular-nums; }
.lyra2 .growing { display: flex; align-items: center; flex-wrap: wrap; gap: 5px 10px; min-height: 26px; }
.lyra2 .growing .status { flex: 1 1 250px; min-width: 0; display: flex; flex-wrap: wrap; gap: 1px 10px; color: var(--lx-quiet); }
.lyra2 .growing .doing { display: flex; align-items: center; gap: 6px; margin-left: auto; }
.lyra2 .mark { display: inline-flex; align-items: center; gap: 5px; white-space: nowrap; font-variant-numeric: tabular-nums; }
.lyra2 .mark::before { content: ""; width: 7px; height: 7px; border-radius: 50%; background: var(--lx-quiet); }
.lyra2 .mark.good::before { background: var(--lx-good); }
.lyra2 .mark.fair::before { background: var(--lx-fair); }
.lyra2 .mark.poor::before { background: var(--lx-poor); }
.lyra2 .mark.plain::before { display: none; }
.lyra2 .advice { color: var(--lx-text); white-space: normal; }
.lyra2 .stepper { display: flex; align-items: center; background: var(--lx-field); border-radius: 6px; }
.lyra2 .stepper b { min-width: 62px; text-align: center; font-weight: 500; font-variant-numeric: tabular-nums; }
.lyra2 .progress { height: 4px; border-radius: 2px; background: var(--lx-field); overflow: hidden; }
.lyra2 .progress div { height: 100%; width: 0; background: var(--lx-accent); border-radius: 2px; }

.lyra2 .help { position: absolute; inset: 0; overflow: auto; padding: 14px 18px; background: color-mix(in srgb, var(--lx-surface) 96%, transparent); columns: 230px 3; column-gap: 26px; scrollbar-width: thin; }
.lyra2 .help h3 { margin: 0 0 4px; font-size: 12px; break-after: avoid; }
.lyra2 .help section { break-inside: avoid; margin-bottom: 14px; }
.lyra2 .help p { margin: 2px 0; display: flex; justify-content: space-between; gap: 12px; color: var(--lx-quiet); }
.lyra2 kbd { font: 600 11px system-ui, sans-serif; color: var(--lx-text); background: var(--lx-field); border: 1px solid var(--lx-line); border-radius: 4px; padding: 0 5px; white-space: nowrap; }
@media (prefers-reduced-motion: reduce) { .lyra2 *, .lyra2 .photo { transition: none !important; } }
`;

/** Adds the sheet once. */
export function addStyle() {
    if (document.getElementById("lyra2-style")) return;
    const style = document.createElement("style");
    style.id = "lyra2-style";
    style.textContent = SHEET;
    document.head.append(style);
}
