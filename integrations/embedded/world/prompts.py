"""Scenes in words: what the text encoder of the embedded model is trained on.

Three kinds, as in DiTFlow's evaluation: the caption (everything), the subject alone and the scene alone.
"""

from corrdit.integrations.embedded.world.scene import Scene, Sprite

PROMPT_KINDS = ("caption", "subject", "scene")
_DESCRIBED_SPRITES = 2


def subject_words(sprite: Sprite) -> str:
    """For instance "a red striped disc"."""
    article = "an" if sprite.colours[0][0] in "aeiou" else "a"
    return f"{article} {sprite.colours[0]} {sprite.texture} {sprite.shape}"


def motion_words(sprite: Sprite) -> str:
    """For instance "moves left", "circles clockwise", "bounces up and grows"."""
    verbs = {"linear": "moves", "accelerated": "accelerates", "circular": "circles", "bouncing": "bounces"}
    extra = []
    if sprite.turns:
        extra.append("turns")
    if abs(sprite.growth - 1) > 0.2:
        extra.append("grows" if sprite.growth > 1 else "shrinks")
    if sprite.path == "still":
        return " and ".join(extra) if extra else "stands still"
    return " and ".join([f"{verbs[sprite.path]} {sprite.direction}", *extra])


def describe(scene: Scene, kind: str = "caption") -> str:
    """The words of a scene.

    kind: "caption" names the one or two foremost sprites, their motion, the background and the camera; "subject" leaves
    out background and camera; "scene" leaves out the sprites. Raises ValueError for another kind.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"kind must be one of {', '.join(PROMPT_KINDS)}, got {kind!r}")
    foremost = scene.sprites[::-1][:_DESCRIBED_SPRITES]
    subjects = " and ".join(f"{subject_words(sprite)} {motion_words(sprite)}" for sprite in foremost)
    place = f"over {scene.background} the camera {scene.camera.move}"
    return {"caption": f"{subjects} {place}", "subject": subjects, "scene": place}[kind]
