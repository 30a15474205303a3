/** What all Explorers of the page share: the client of worlds, the texts, the look, and the stage once one is seen. */

import { el } from "./dom.mjs";
import { Stage } from "./stage.mjs";
import { Worlds } from "./worlds.mjs";

export const page = { worlds: null, stage: null, t: null, presets: null, explorers: new Set() };

/** The first Explorer brings what came with the modules: texts in the page's language and the style sheet. */
export function furnish(api, texts, sheet) {
    if (page.worlds) return;
    page.worlds = new Worlds(api);
    page.t = (id, values = {}) => (texts[id] ?? id).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
    document.head.append(el("style", { textContent: sheet }));
}

/** The stage of the page, made with the libraries of the host's own frontend (of this version) when it is first needed. */
export function openStage(app, api, version) {
    page.stage ??= (async () => {
        if (!version) throw new Error((await page.worlds.json("/lyra2/lib")).missing);
        const library = (name) => import(api.fileURL(`/lyra2/lib/${version}/${name}`));
        const stage = new Stage(await library("three.module.js"), library);
        stage.watchZoom(app.canvas);
        return stage;
    })().catch((error) => {
        page.stage = null;
        throw error;
    });
    return page.stage;
}
