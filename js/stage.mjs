/**
 * The page's one renderer. It is lent to the Explorer in use, as a canvas inside its view; the others show a picture.
 *
 * Everything in the scene is in the world's own axes (OpenCV) below one group that is turned half round x, which is the
 * way between those and three.js (y up, z backward).
 */

import { halfHeight, inverse, turned } from "./path.mjs";

const BACKGROUND = 0x15171b;
const SOFTWARE = /swiftshader|llvmpipe|software/i;
const WANTED_FRAME = 70;        // milliseconds while moving
const FEWEST = 60_000;          // points while moving, however slow that is: fewer are no picture
const SETTLE = 160;             // milliseconds without motion until everything is drawn again
const APPEAR = 700;             // milliseconds in which new points grow to their size

const POINT_VERTEX = `
precision highp float;
in vec4 position; in vec4 colour; in float source;
uniform mat4 modelViewMatrix, projectionMatrix;
uniform float stride, grown, pixels, bigger, tint; uniform vec2 sources;
out vec3 shade;
void main() {
    vec4 local = modelViewMatrix * vec4(position.xyz, 1.0);
    gl_Position = projectionMatrix * local;
    if (source < sources.x || source > sources.y) gl_Position.z = -2.0 * abs(gl_Position.w) - 1.0;
    gl_PointSize = clamp(1.5 * stride * position.w * grown * bigger * pixels / max(-local.z, 1e-6), 1.0, 96.0);
    shade = mix(colour.rgb, colour.a > 0.5 ? vec3(0.95, 0.55, 0.30) : vec3(0.35, 0.62, 0.95), tint * 0.45);
}`;
const POINT_FRAGMENT = `
precision mediump float;
in vec3 shade; out vec4 pixel;
void main() { pixel = vec4(shade, 1.0); }`;
const STRIPES_FRAGMENT = `
precision mediump float;
out vec4 pixel; uniform float period;
void main() {
    float stripe = step(0.5, fract((gl_FragCoord.x + gl_FragCoord.y) / period));
    pixel = vec4(mix(vec3(0.15, 0.115, 0.085), vec3(0.27, 0.19, 0.115), stripe), 1.0);
}`;
const SCREEN_VERTEX = `
precision highp float;
in vec3 position;
void main() { gl_Position = vec4(position.xy, 0.999, 1.0); }`;

export class Stage {
    /** @param {object} three  the module  @param {(name: string) => Promise<object>} library  loads TransformControls or spark */
    constructor(three, library) {
        this.three = three;
        this.library = library;
        this.blocks = new Map();            // "folder state" -> {points, block, shown, since}
        this.owner = null;
        this.limit = 500_000;
        this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
        this.drawn = 0;                     // points of the last frame
        this.canvas = document.createElement("canvas");
        this.canvas.className = "lyra2-stage";
        this.openRenderer();
        this.buildScene();
        this.canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
        this.canvas.addEventListener("webglcontextrestored", () => {
            this.fence = null;
            this.invalidate();
        });
        document.addEventListener("visibilitychange", () => this.invalidate());
    }

    openRenderer() {
        const { WebGLRenderer } = this.three;
        this.renderer = new WebGLRenderer({ canvas: this.canvas, antialias: false, alpha: false, powerPreference: "high-performance" });
        this.renderer.autoClear = false;
        const gl = (this.gl = this.renderer.getContext());
        const names = gl.getExtension("WEBGL_debug_renderer_info");
        this.software = SOFTWARE.test(String(gl.getParameter(names ? names.UNMASKED_RENDERER_WEBGL : gl.RENDERER)));
        this.movingBudget = this.software ? 60_000 : 400_000;
    }

    buildScene() {
        const { Scene, Group, PerspectiveCamera, Color, Vector2, Mesh, PlaneGeometry, RawShaderMaterial, GLSL3 } = this.three;
        this.scene = new Scene();
        this.scene.background = null;
        this.root = new Group();
        this.root.quaternion.set(1, 0, 0, 0);
        this.scene.add(this.root);
        this.background = new Color(BACKGROUND);
        this.camera = new PerspectiveCamera(50, 1, 0.01, 1000);
        this.side = new PerspectiveCamera(50, 1, 0.01, 1000);
        this.shared = { pixels: { value: 1 }, bigger: { value: 1 }, tint: { value: 0 }, sources: { value: new Vector2(-1e9, 1e9) } };
        this.stripes = new Mesh(new PlaneGeometry(2, 2), new RawShaderMaterial({
            glslVersion: GLSL3, vertexShader: SCREEN_VERTEX, fragmentShader: STRIPES_FRAGMENT,
            uniforms: { period: { value: 14 } }, depthTest: false, depthWrite: false,
        }));
        this.stripes.frustumCulled = false;
        this.backdrop = new Scene();
        this.backdrop.add(this.stripes);
    }

    // ------------------------------------------------------------------------------------------------------ lending

    /** Puts the canvas into the owner's view; the former owner keeps a picture of its last frame. */
    lend(owner) {
        if (this.owner === owner && this.canvas.parentElement === owner.view) return this.invalidate();
        this.takeBack();
        this.owner = owner;
        this.setSplats(false);
        owner.view.prepend(this.canvas);
        owner.onLent?.();
        this.invalidate();
    }

    takeBack(from = this.owner) {
        if (!from || this.owner !== from) return;
        this.detachGizmo();
        const picture = this.picture();
        this.owner = null;
        this.canvas.remove();
        from.onTakenBack?.(picture);
    }

    /** A copy of what is drawn, as a plain canvas; null before anything was. */
    picture() {
        const { width, height } = this.canvas;
        if (!this.owner || !this.lastDraw || width < 2 || this.gl.isContextLost()) return null;
        this.render(this.lastDraw);
        const copy = document.createElement("canvas");
        Object.assign(copy, { width, height });
        copy.getContext("2d").drawImage(this.canvas, 0, 0);
        return copy;
    }

    // ------------------------------------------------------------------------------------------------------- blocks

    addBlock(key, block) {
        if (this.blocks.has(key)) return;
        const { BufferGeometry, BufferAttribute, Float32BufferAttribute, Points, RawShaderMaterial, GLSL3 } = this.three;
        const geometry = new BufferGeometry();
        geometry.setAttribute("position", new BufferAttribute(block.positions, 4));
        geometry.setAttribute("colour", new BufferAttribute(block.colours, 4, true));
        geometry.setAttribute("source", new Float32BufferAttribute(block.frames, 1));
        const material = new RawShaderMaterial({
            glslVersion: GLSL3, vertexShader: POINT_VERTEX, fragmentShader: POINT_FRAGMENT,
            uniforms: { ...this.shared, stride: { value: 1 }, grown: { value: 0 } },
        });
        const points = new Points(geometry, material);
        points.frustumCulled = false;
        points.matrixAutoUpdate = false;
        this.root.add(points);
        this.blocks.set(key, { points, block, shown: false, since: 0 });
    }

    /** Shows exactly these blocks. Those of no open world are let go by `keepOnly`. */
    show(keys) {
        const wanted = new Set(keys), now = performance.now();
        for (const [key, entry] of this.blocks) {
            const shown = wanted.has(key);
            if (shown && !entry.shown) entry.since = now;
            entry.shown = entry.points.visible = shown;
        }
        this.splatKeys = null;
        this.invalidate();
    }

    keepOnly(keys) {
        const wanted = new Set(keys);
        for (const [key, { points }] of this.blocks) {
            if (wanted.has(key)) continue;
            this.root.remove(points);
            points.geometry.dispose();
            points.material.dispose();
            this.blocks.delete(key);
        }
    }

    shownBlocks() {
        return [...this.blocks.values()].filter((entry) => entry.shown);
    }

    /** How many points are drawn of each block when there is room for `budget`: the same share of all, at least its first level. */
    setBudget(budget) {
        const shown = this.shownBlocks(), total = shown.reduce((sum, { block }) => sum + block.count, 0);
        const share = Math.min(1, budget / Math.max(total, 1)), now = performance.now();
        let drawn = 0;
        for (const { points, block, since } of shown) {
            const count = Math.ceil(block.count * share);
            points.geometry.setDrawRange(0, count);
            // the finest level that is drawn whole closes the view; a part of the next only sharpens it
            const whole = block.levelEnds.findLastIndex((end) => end <= count);
            points.material.uniforms.stride.value = block.strides[Math.max(whole, 0)] ?? 1;
            points.material.uniforms.grown.value = this.still ? 1 : Math.min(1, (now - since) / APPEAR);
            drawn += count;
        }
        this.drawn = drawn;
        return total;
    }

    // -------------------------------------------------------------------------------------------------------- frames

    invalidate() {
        if (!this.raf && this.owner) this.raf = requestAnimationFrame((now) => this.tick(now));
    }

    tick(now) {
        this.raf = 0;
        const owner = this.owner;
        if (!owner || !owner.visible || document.hidden || this.gl.isContextLost()) {
            this.before = 0;
            return;
        }
        const step = Math.min(this.before ? now - this.before : 16, 250) / 1000;
        const moving = owner.onFrame(step, now);
        const growing = this.shownBlocks().some(({ since }) => now - since < APPEAR);
        this.before = moving || growing ? now : 0;
        // one frame in flight: a renderer that is slower than the page must not make the page wait for it
        if (this.drawing()) return this.invalidate();
        this.draw(owner, moving || growing);
        if (moving || growing) this.invalidate();
    }

    draw(owner, moving) {
        if (!this.fit(owner.view)) return;
        clearTimeout(this.settling);
        const total = this.setBudget(moving ? Math.min(this.movingBudget, this.limit) : this.limit);
        if (moving && total > this.drawn) this.settling = setTimeout(() => this.invalidate(), SETTLE);
        this.lastDraw = owner.picture();
        this.begun = performance.now();
        this.render(this.lastDraw);
        this.fence = { sync: this.gl.fenceSync(this.gl.SYNC_GPU_COMMANDS_COMPLETE, 0), moving, points: this.drawn };
        this.gl.flush();
        owner.onDrawn?.(moving);
    }

    /** Whether the last frame is still being drawn; learns from it how many points fit into one while moving. */
    drawing() {
        if (!this.fence) return false;
        const { sync, moving, points } = this.fence;
        if (sync && this.gl.getSyncParameter(sync, this.gl.SYNC_STATUS) !== this.gl.SIGNALED) return true;
        const took = performance.now() - this.begun;
        if (sync) this.gl.deleteSync(sync);
        this.fence = null;
        if (moving) {
            const fitting = points * Math.min(2, Math.max(0.25, WANTED_FRAME / Math.max(took, 1)));
            this.movingBudget = Math.round(Math.min(2_000_000, Math.max(FEWEST, fitting, took < WANTED_FRAME ? this.movingBudget : 0)));
        }
        return false;
    }

    /** The buffer is as large as the view is on the screen, however the graph is zoomed. */
    fit(view) {
        const rect = view.getBoundingClientRect(), ratio = Math.min(devicePixelRatio || 1, 2);
        const [width, height] = [rect.width, rect.height].map((side) => Math.round(side * ratio));
        if (width < 4 || height < 4) return false;
        if (this.canvas.width !== width || this.canvas.height !== height) this.renderer.setSize(width, height, false);
        this.ratio = ratio;
        this.scale = rect.width / Math.max(view.clientWidth, 1);
        return true;
    }

    /** Zoomed, the graph shows the view in another size, which nothing tells but that the graph is drawn. */
    watchZoom(graph) {
        const { onDrawForeground } = graph;
        graph.onDrawForeground = (...given) => {
            onDrawForeground?.apply(graph, given);
            clearTimeout(this.zooming);
            this.zooming = setTimeout(() => {
                const { width } = this.owner?.view.getBoundingClientRect() ?? {};
                if (width && Math.abs(width * this.ratio - this.canvas.width) > 1) this.invalidate();
            }, SETTLE);
        };
    }

    /**
     * @param {{pose: object, fov: number, near: number, far: number, side: ?{pose: object, fov: number, aspect: number, rect: number[]}}} picture
     * fov: of the canvas, vertical; side.rect: left, top, width, height in the view's own pixels
     */
    render({ pose, fov, near, far, side }) {
        const { renderer } = this, { width, height } = this.canvas;
        this.aim(this.camera, pose, fov, width / height, near, far);
        renderer.setViewport(0, 0, width, height);
        renderer.setScissorTest(false);
        renderer.setClearColor(this.background, 1);
        renderer.clear();
        this.shared.pixels.value = height / 2 / halfHeight(fov);
        this.followSplats();
        renderer.render(this.scene, this.camera);
        if (side) this.renderSide(side, near, far);
    }

    renderSide({ pose, fov, aspect, rect }, near, far) {
        const { renderer } = this, by = this.ratio * this.scale;
        const [left, top, width, height] = rect.map((value) => Math.round(value * by));
        const bottom = this.canvas.height - top - height;
        const splats = this.splats?.mesh.visible, gizmo = this.gizmo?.getHelper().visible;
        if (splats) this.swapSplats(false);
        if (gizmo) this.gizmo.getHelper().visible = false;
        renderer.setScissorTest(true);
        renderer.setScissor(left, bottom, width, height);
        renderer.setViewport(left, bottom, width, height);
        renderer.clear();
        renderer.render(this.backdrop, this.camera);
        this.aim(this.side, pose, fov, aspect, near, far);
        this.shared.pixels.value = height / 2 / halfHeight(fov);
        renderer.clearDepth();
        renderer.render(this.scene, this.side);
        renderer.setScissorTest(false);
        if (splats) this.swapSplats(true);
        if (gizmo) this.gizmo.getHelper().visible = true;
    }

    aim(camera, { R, T }, fov, aspect, near, far) {
        camera.quaternion.set(R[0], -R[1], -R[2], R[3]);
        camera.position.set(T[0], -T[1], -T[2]);
        Object.assign(camera, { fov, aspect, near, far });
        camera.updateProjectionMatrix();
        camera.updateMatrixWorld();
    }

    /** The nearest known point within a few pixels of the ray through (x, y) of the view, each -1 to 1, y down; or null. */
    pick({ R, T }, fov, aspect, x, y, reach = 0.03) {
        const across = halfHeight(fov), back = inverse(R);
        let best = null, bestDepth = Infinity;
        for (const { block } of this.shownBlocks()) {
            const { positions } = block, end = Math.min(block.count, 60_000);
            for (let i = 0; i < end; i++) {
                const local = turned(back, [positions[4 * i] - T[0], positions[4 * i + 1] - T[1], positions[4 * i + 2] - T[2]]);
                if (local[2] <= 0 || local[2] >= bestDepth) continue;
                const px = local[0] / (local[2] * across * aspect), py = local[1] / (local[2] * across);
                if (Math.abs(px - x) > reach / aspect || Math.abs(py - y) > reach) continue;
                bestDepth = local[2];
                best = [positions[4 * i], positions[4 * i + 1], positions[4 * i + 2]];
            }
        }
        return best;
    }

    // -------------------------------------------------------------------------------------------------------- gizmo

    /** Shows handles that move or turn a pose; `onChange` gets it while they are dragged, `onEnd` once they are let go. */
    async attachGizmo(sink, pose, mode, space, { onChange, onDragging }) {
        const { TransformControls } = await this.library("TransformControls.js");
        if (!sink.isConnected) return;
        this.handlers = { onChange, onDragging };
        if (!this.gizmo) {
            this.gizmo = new TransformControls(this.camera, sink);
            this.handle = new this.three.Object3D();
            this.scene.add(this.handle, this.gizmo.getHelper());
            this.gizmo.setSize(0.75);
            this.gizmo.addEventListener("change", () => this.invalidate());
            this.gizmo.addEventListener("dragging-changed", ({ value }) => this.handlers?.onDragging(value));
            this.gizmo.addEventListener("objectChange", () => this.handlers?.onChange(this.handlePose()));
        } else if (this.gizmo.domElement !== sink) {
            if (this.gizmo.domElement) this.gizmo.disconnect();
            this.gizmo.connect(sink);
        }
        this.gizmo.setMode(mode);
        this.gizmo.setSpace(space);
        this.placeGizmo(pose);
        this.gizmo.attach(this.handle);
        this.invalidate();
    }

    placeGizmo({ R, T }) {
        if (!this.gizmo || this.gizmo.dragging) return;
        // the handle stands in three's axes: turned half round x on both sides
        this.handle.quaternion.set(R[0], -R[1], -R[2], R[3]);
        this.handle.position.set(T[0], -T[1], -T[2]);
        this.handle.updateMatrixWorld();
    }

    handlePose() {
        const q = this.handle.quaternion, p = this.handle.position;
        return { R: [q.x, -q.y, -q.z, q.w], T: [p.x, -p.y, -p.z] };
    }

    detachGizmo() {
        if (!this.gizmo) return;
        this.gizmo.detach();
        if (this.gizmo.domElement) this.gizmo.disconnect();
        this.gizmo.domElement = null;
        this.handlers = null;
        this.invalidate();
    }

    // ------------------------------------------------------------------------------------------------------- splats

    /** Gaussians in place of points, made here of the same blocks. */
    async setSplats(on) {
        this.wantsSplats = on;
        if (on && !this.spark) {
            const spark = await this.library("spark.module.js");
            this.spark ??= spark;
        }
        if (!this.wantsSplats && this.splats) this.dropSplats();
        this.invalidate();
    }

    /** Builds the gaussians again when other blocks are shown. */
    followSplats() {
        if (!this.wantsSplats || !this.spark) return;
        const shown = this.shownBlocks(), key = [...this.blocks].filter(([, entry]) => entry.shown).map(([name]) => name).join();
        if (this.splatKeys !== key) {
            this.dropSplats();
            this.splatKeys = key;
            if (shown.length) this.buildSplats(shown);
        }
        if (this.splats) this.swapSplats(true);
    }

    buildSplats(shown) {
        const { SparkRenderer, PackedSplats, SplatMesh } = this.spark, { Vector3, Quaternion, Color } = this.three;
        const total = shown.reduce((sum, { block }) => sum + block.count, 0);
        const share = Math.min(1, Math.min(this.limit, this.software ? 20_000 : 1_000_000) / Math.max(total, 1));
        const splats = new PackedSplats({ maxSplats: Math.ceil(total * share) + shown.length });
        const centre = new Vector3(), scales = new Vector3(), turn = new Quaternion(), colour = new Color();
        for (const { block } of shown) {
            const count = Math.ceil(block.count * share), whole = Math.max(0, block.levelEnds.findLastIndex((end) => end <= count));
            for (let i = 0; i < count; i++) {
                centre.fromArray(block.positions, 4 * i);
                scales.setScalar(0.6 * block.strides[whole] * block.positions[4 * i + 3]);
                colour.setRGB(block.colours[4 * i] / 255, block.colours[4 * i + 1] / 255, block.colours[4 * i + 2] / 255);
                splats.pushSplat(centre, scales, turn, 0.95, colour);
            }
        }
        const mesh = new SplatMesh({ packedSplats: splats });
        this.root.add(mesh);
        if (!this.sparkRenderer) {
            // one for good: what it does for a frame may go on after that frame
            this.sparkRenderer = new SparkRenderer({ renderer: this.renderer, onDirty: () => this.invalidate() });
            this.scene.add(this.sparkRenderer);
        }
        this.splats = { mesh, count: splats.numSplats };
    }

    swapSplats(on) {
        this.splats.mesh.visible = this.sparkRenderer.visible = on;
        for (const { points, shown } of this.blocks.values()) points.visible = shown && !on;
    }

    dropSplats() {
        this.splatKeys = null;
        if (!this.splats) return;
        this.swapSplats(false);
        const { mesh } = this.splats;
        this.root.remove(mesh);
        setTimeout(() => mesh.dispose?.(), 2000);      // an update of it may still be under way
        this.splats = null;
    }
}
