"""What `facefed serve` answers: the page's three files, and the same questions as JSON under /api.

Pictures come as base64 in JSON, not as a form: a form's parts would be spooled to disk.  They are in memory while they
are looked at, one request at a time, and nowhere else.  Each decision leaves a line in the gallery's decisions.jsonl,
before it is told: without a line no answer.
"""

import base64
import binascii
import datetime as dt
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError, FaceFedError, UserError
from common.system.files import append_line
from simulation.recognition.asking import Recognised, Recognition, look_alikes
from simulation.recognition.decision import basis
from simulation.recognition.door import API, Limits
from simulation.recognition.gallery import Gallery, add_people, checked_name, open_gallery, remove_people, state_of
from simulation.recognition.photographs import Seen, whose
from simulation.recognition.search import Float32

AUDIT: Final = "decisions.jsonl"
MOST_CANDIDATES: Final = 50
_PAGE: Final[Mapping[str, tuple[str, str]]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class _Question:
    """What is asked; a field that it has not is refused."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid"}


@dataclass(frozen=True)
class Pair(_Question):
    """Two pictures, base64."""

    first: str
    second: str


@dataclass(frozen=True)
class Who(_Question):
    """A picture, base64, and how many people to name of each face."""

    picture: str
    top: int = 5


@dataclass(frozen=True)
class Newcomer(_Question):
    """Somebody to enrol: pictures, base64."""

    name: str
    pictures: list[str]


@dataclass(frozen=True)
class Leaver(_Question):
    """Somebody to remove."""

    name: str


@dataclass(kw_only=True)
class Desk:
    """Answers one question at a time, whichever thread asks: two cores do not look at ten pictures faster at once."""

    folder: Path
    asked: Recognition
    limits: Limits = field(default_factory=Limits)
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _gallery: Gallery | None = None

    def gallery(self) -> Gallery:
        """As it is now, also where another program changed it.  Raises UserError: another model by now."""
        if self._gallery is None or state_of(self.folder) != self._gallery.state:
            found = open_gallery(self.folder)
            if found.binding.sha256 != self.asked.model.binding.sha256:  # it is not kept, so each question is refused
                raise UserError(
                    f"the gallery is now one of {found.binding.words}; start the server again to use that model."
                )
            self._gallery = found
        return self._gallery

    def about(self) -> dict[str, Any]:
        """The model, its figures, and the gallery."""
        with self._turn:
            gallery, asked = self.gallery(), self.asked
        known = asked.known
        return {
            "model": asked.model.binding.source,
            "sha256": asked.model.binding.sha256,
            **self._threshold(),
            "rate": asked.rate,
            "search": asked.search_rate(gallery),
            "eer": known.eer,
            "basis": basis(known),
            "histogram": [list(known.genuine), list(known.impostor)],
            "cautions": list(asked.cautions),
            "num_people": len(gallery.people),
            "num_templates": len(gallery.templates),
            "limits": {
                "picture_bytes": self.limits.picture_bytes,
                "pictures": self.limits.pictures,
                "body_bytes": self.limits.body_bytes,
            },
        }

    def verify(self, pair: Pair) -> dict[str, Any]:
        """Whether two pictures show one person."""
        first, second = self._bytes(pair.first, "the first picture"), self._bytes(pair.second, "the second picture")
        with self._turn:
            faces = [self._faces(source, name) for source, name in ((first, "first"), (second, "second"))]
            found = self.asked.compared(*faces)
            outcome = "same" if found.same else "different"
            self._audit("verify", score=found.score, outcome=outcome)
        return {
            "same": found.same,
            "score": found.score,
            **self._threshold(),
            "rate": self.asked.rate,
            "faces": [
                {**_shown(face), "num_faces": number}
                for face, number in zip((found.first, found.second), found.num_faces, strict=True)
            ],
            "cautions": list(self.asked.cautions),
        }

    def identify(self, who: Who) -> dict[str, Any]:
        """Who is on a picture, each face of it."""
        if not 1 <= who.top <= MOST_CANDIDATES:
            raise UserError(f"top = {who.top}: ask for 1 to {MOST_CANDIDATES} people.")
        source = self._bytes(who.picture, "the picture")
        with self._turn:
            gallery = self.gallery()
            found = self.asked.identify(source, gallery, who.top)
            for one in found:
                score = one.candidates[0].score if one.candidates else None
                self._audit("identify", score=score, outcome=one.person.key if one.person else "unknown")
        return {
            "faces": [_recognised(one) for one in found],
            **self._threshold(),
            "search": self.asked.search_rate(gallery),
            "cautions": list(self.asked.cautions),
        }

    def enrol(self, newcomer: Newcomer) -> dict[str, Any]:
        """Enrol somebody, or give them further templates."""
        name = checked_name(newcomer.name.strip())
        if not 1 <= len(newcomer.pictures) <= self.limits.pictures:
            raise UserError(f"{len(newcomer.pictures)} pictures: give 1 to {self.limits.pictures}.")
        sources = [self._bytes(text, f"picture {number}") for number, text in enumerate(newcomer.pictures, start=1)]
        with self._turn:
            rows, left_out = self._templates(sources)
            if not rows:
                reasons = "; ".join(f"picture {number}: {reason}" for number, reason in left_out)
                raise DataError(f"{name} is not enrolled: {reasons}.")
            model = self.asked.model
            added = add_people(
                self.folder,
                model.binding,
                {name: np.concatenate(rows)},
                keep_model=model.keep,
                again=f"facefed enrol {self.folder} PEOPLE --model MODEL --replace",
            )
            self._gallery = added.gallery
            number, one = next((n, one) for n, one in enumerate(added.gallery.people) if one.name == name)
            self._audit("enrol", outcome=one.key)
            alike = look_alikes(added.gallery, [name], self.asked.threshold.threshold)
        return {
            "name": name,
            "num_templates": added.num_templates,
            "num_known": added.num_known,
            "num_in_all": added.gallery.people[number].num_templates,
            "left_out": [{"picture": number, "reason": reason} for number, reason in left_out],
            "look_alikes": [{"name": other, "score": score} for _, other, score in alike],
        }

    def _templates(self, sources: Sequence[bytes]) -> tuple[list[Float32], list[tuple[int, str]]]:
        rows, left_out = [], []
        for number, source in enumerate(sources, start=1):
            try:
                face, reason = whose(self.asked.photographs.faces(source))
            except DataError as error:
                left_out.append((number, str(error).removeprefix("the picture: ").partition(";")[0]))
                continue
            if face is None:
                left_out.append((number, reason))
            else:
                rows.append(self.asked.model.embed(face.picture[None]))
        return rows, left_out

    def people(self) -> dict[str, Any]:
        """Who is enrolled."""
        with self._turn:
            gallery = self.gallery()
        return {
            "people": [
                {"name": one.name, "num_templates": one.num_templates, "enrolled": one.enrolled}
                for one in gallery.people
            ]
        }

    def remove(self, leaver: Leaver) -> dict[str, Any]:
        """Take somebody out for good."""
        with self._turn:
            key = next((one.key for one in self.gallery().people if one.name == leaver.name), "")
            self._gallery = remove_people(self.folder, [leaver.name])
            self._audit("remove", outcome=key)
            return {"num_people": len(self._gallery.people)}

    def _faces(self, source: bytes, name: str) -> list[Seen]:
        try:
            return self.asked.photographs.faces(source)
        except DataError as error:
            raise DataError(str(error).replace("the picture", f"the {name} picture", 1)) from None

    def _bytes(self, text: str, name: str) -> bytes:
        """The picture of a base64 text.  Raises DataError."""
        if len(text) > self.limits.picture_bytes * 4 // 3 + 4:
            raise DataError(f"{name}: larger than {self.limits.picture_bytes // 2**20} MiB; give a smaller one.")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise DataError(f"{name}: is no base64 text; encode the bytes of its file.") from None

    def _threshold(self) -> dict[str, Any]:
        threshold = self.asked.threshold
        return {
            "threshold": threshold.threshold,
            "far": threshold.far,
            "far_interval": [threshold.far_low, threshold.far_high],
        }

    def _audit(self, what: str, *, outcome: str, score: float | None = None) -> None:
        """A line of what was decided.  outcome: same, different, unknown, or a person's key in the gallery."""
        path = self.folder / AUDIT
        path.touch(mode=0o600)
        line = {
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "what": what,
            "model": self.asked.model.binding.source,
            "model_sha256": self.asked.model.binding.sha256,
            "score": score,
            "threshold": self.asked.threshold.threshold,
            "far": self.asked.threshold.far,
            "outcome": outcome,
        }
        append_line(path, line, synced=True)


def _recognised(one: Recognised) -> dict[str, Any]:
    least = one.threshold.threshold
    return {
        **_shown(one.face),
        "name": one.person.name if one.person else None,
        "candidates": [
            {"name": each.person.name, "score": each.score, "reaches": each.score >= least} for each in one.candidates
        ],
    }


def _shown(face: Seen) -> dict[str, Any]:
    quality = face.quality
    return {
        "picture": _data_uri(face.picture),
        "box": list(face.box),
        "size_px": quality.size_px,
        "faults": face.faults,
    }


def _data_uri(picture: NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def app_of(desk: Desk) -> FastAPI:
    """The page and the API; nothing of it asks outside, and there is no page of FastAPI's own, which would."""
    app = FastAPI(title="FaceFed", docs_url=None, redoc_url=None, openapi_url=f"{API}openapi.json")
    for path, (name, kind) in _PAGE.items():
        content = (resources.files("simulation.recognition") / "web" / name).read_bytes()
        app.add_api_route(path, _file(content, kind), methods=["GET"], include_in_schema=False)
    app.add_api_route("/health", lambda: {"status": "ok"}, methods=["GET"], include_in_schema=False)
    # Plain functions: FastAPI runs each in a thread, so the page stays quick while a picture is looked at.
    app.add_api_route(f"{API}model", desk.about, methods=["GET"])
    app.add_api_route(f"{API}people", desk.people, methods=["GET"])
    app.add_api_route(f"{API}verify", desk.verify, methods=["POST"])
    app.add_api_route(f"{API}identify", desk.identify, methods=["POST"])
    app.add_api_route(f"{API}enrol", desk.enrol, methods=["POST"])
    app.add_api_route(f"{API}remove", desk.remove, methods=["POST"])
    app.add_exception_handler(FaceFedError, _told)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(OSError, _failed)
    return app


def _file(content: bytes, kind: str) -> Any:  # noqa: ANN401 - what FastAPI takes
    def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


async def _told(_request: Request, error: Exception) -> JSONResponse:
    """One line: what was wrong, what was seen, what to do."""
    return JSONResponse({"error": str(error)}, status_code=422 if isinstance(error, UserError) else 500)


async def _malformed(_request: Request, error: Exception) -> JSONResponse:
    """Without what was sent: FastAPI's own answer would send the picture back."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    where = ".".join(str(part) for part in first.get("loc", ()))
    return JSONResponse({"error": f"{where}: {first.get('msg', 'malformed')}; see /api/openapi.json."}, status_code=422)


async def _failed(_request: Request, error: Exception) -> JSONResponse:
    reason = getattr(error, "strerror", None) or type(error).__name__
    return JSONResponse({"error": f"the gallery's folder cannot be used: {reason}."}, status_code=500)
