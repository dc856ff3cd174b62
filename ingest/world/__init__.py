"""The sample world: seeded videos of moving, sounding things, with their clip lists, for the demo, the tests and the study.

Fifteen classes whose look, motion and sound belong together. Colour, loudness and encoded sizes are drawn independently of the
class and of each other, so that neither class nor pairing can be read off without watching and listening.
"""

from cmacc.ingest.world.render import World, WorldConfig, render_world
from cmacc.ingest.world.serve import serve
from cmacc.ingest.world.things import CLASSES

__all__ = ["CLASSES", "World", "WorldConfig", "render_world", "serve"]
