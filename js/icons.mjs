/** Our own icons: strokes on 16 x 16. */

const SHAPES = {
    home: "M2.5 7.5 8 3l5.5 4.5M4 7v6h8V7M6.8 13V9.5h2.4V13",
    key: "M8 3v10M3 8h10",
    set: "M8 2.5v2M8 11.5v2M2.5 8h2M11.5 8h2M8 5.2A2.8 2.8 0 1 1 8 10.8 2.8 2.8 0 0 1 8 5.2",
    undo: "M3 6.5h6.5a3.2 3.2 0 0 1 0 6.5H6M3 6.5 5.8 3.7M3 6.5l2.8 2.8",
    redo: "M13 6.5H6.5a3.2 3.2 0 0 0 0 6.5H10M13 6.5l-2.8-2.8M13 6.5l-2.8 2.8",
    move: "M8 2v12M2 8h12M8 2 6.3 3.7M8 2l1.7 1.7M8 14l-1.7-1.7M8 14l1.7-1.7M2 8l1.7-1.7M2 8l1.7 1.7M14 8l-1.7-1.7M14 8l-1.7 1.7",
    turn: "M13 8a5 5 0 1 1-1.6-3.7M11.6 1.8v2.7H8.9",
    space: "M8 8V2.5M8 8l5 2.8M8 8l-5 2.8M6.6 3.9 8 2.5l1.4 1.4",
    record: "M8 4.2a3.8 3.8 0 1 1 0 7.6 3.8 3.8 0 0 1 0-7.6",
    orbit: "M8 7a1 1 0 1 1 0 2 1 1 0 1 1 0-2M10.5 3.500C13 4.600 14.300 6.500 13.900 8.300c-.6 2.300-3.700 3.600-7 2.800S1.500 7.900 2.100 5.700c.3-1.300 1.500-2.200 3.100-2.700M5.600 4.900 5.300 3 3.500 3.500",
    along: "M2.5 12.5c3 0 2.5-8 6-8 2.2 0 2.6 3 4.8 3M11 5.2l2.4 2.3L11 9.8",
    play: "M5 3.2v9.6L12.6 8z",
    duplicate: "M6 6h7v7H6zM3 10V3h7",
    remove: "M3.5 4.5h9M6.5 4.5V3h3v1.5M5 4.5l.6 8.5h4.8l.6-8.5",
    previous: "M10 3.5 5.5 8l4.5 4.5",
    next: "M6 3.5 10.5 8 6 12.5",
    full: "M3 6V3h3M10 3h3v3M13 10v3h-3M6 13H3v-3",
    help: "M6 6.2C6 5 6.9 4.2 8 4.2s2 .8 2 1.9c0 1.5-2 1.6-2 3.1M8 11.6v.2",
    panelKey: "M3 12.5h10M4.5 12.5 3.4 5.8 6.4 8 8 4l1.6 4 3-2.2-1.1 6.7",
    panelPath: "M3.5 11.8a1.3 1.3 0 1 0 0 .1M12.5 4.2a1.3 1.3 0 1 0 0 .1M4.8 11.6C11 11 4 5 11.1 4.4",
    panelHistory: "M4 3.5v6M4 12.3a1.4 1.4 0 1 0 0-.1M4 6.5h4.5a3 3 0 0 1 3 3M11.5 12.3a1.4 1.4 0 1 0 0-.1",
    panelView: "M1.8 8S4 4 8 4s6.2 4 6.2 4-2.2 4-6.2 4-6.2-4-6.2-4M8 6.3A1.7 1.7 0 1 1 8 9.7 1.7 1.7 0 0 1 8 6.3",
    splats: "M5.4 5.2c2-2 4.2-1.8 4.4.2.2 2.2-2.6 1.7-1.6 3.3 1 1.7 4.3-.5 4.4 2 .1 2.6-7 3.4-9 .7-1.6-2.2-.2-4.2 1.8-6.2",
    grow: "M8 13.5V7M8 7c0-2.6-1.8-4-4.5-4C3.5 5.7 5 7 8 7M8 9.3c0-2.1 1.6-3.3 4.3-3.3 0 2.3-1.5 3.3-4.3 3.3",
    stop: "M4.5 4.5h7v7h-7z",
    back: "M9.5 4 5.5 8l4 4",
    reroll: "M3 8a5 5 0 0 1 8.6-3.4L13 6M13 8a5 5 0 0 1-8.6 3.4L3 10M13 3v3h-3M3 13v-3h3",
    begin: "M2.5 3.5h11v9h-11zM2.5 10.5l3.2-3 2.5 2.2 2-1.7 3.3 2.7M10.4 5.9v.2",
    reverse: "M3 5.5h10M10.5 3 13 5.5 10.5 8M13 10.5H3M5.5 8 3 10.5 5.5 13",
    load: "M3 10v3h10v-3M8 10V3M5.2 7.2 8 10l2.8-2.8",
    save: "M3 10v3h10v-3M8 3v7M5.2 5.8 8 3l2.8 2.8",
    close: "M4 4l8 8M12 4l-8 8",
    minus: "M4 8h8",
    plus: "M8 4v8M4 8h8",
};
const FILLED = new Set(["play", "stop", "record"]);
const SVG = "http://www.w3.org/2000/svg";

/** The icon as an SVG element. */
export function icon(name) {
    const svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", SHAPES[name]);
    if (FILLED.has(name)) svg.classList.add("filled");
    svg.append(path);
    return svg;
}

export const ICONS = Object.keys(SHAPES);
