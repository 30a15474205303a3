"""ComfyUI-LyraWorlds: one photo becomes a world that you walk through, come back to and extend."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    from .nodes import LyraExtension
    return LyraExtension()
