"""What is wrong with a constitution, all at once: also what loading lets pass and is hardly meant.

Whether a question asks for the worse answer is guessed from its words, clause by clause: a marker such as `more
harmful` or `least helpful` counts unless something before it turns it round, as in `less likely to be more harmful`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from cai_ray.constitution import Constitution, examine, read_constitution

_BAD = (
    r"(?:harmful|hurtful|toxic|dangerous|hazardous|risky|rude|mean|nasty|cruel|vile|hateful|hostile|aggressive|violent"
    r"|threatening|abusive|offensive|insulting|racist|sexist|misogynistic|biased|bigoted|discriminatory|prejudiced"
    r"|derogatory|demeaning|obscene|vulgar|criminal|evil|bad|wrong|false|misleading|deceptive|manipulative|preachy"
    r"|condescending|accusatory|obnoxious|annoying|evasive|problematic|objectionable|damaging|careless|reckless"
    r"|irresponsible|controversial|(?:un|dis|im|il|in)(?:ethical|safe|kind|friendly|fair|helpful|truthful|wise|lawful"
    r"|pleasant|acceptable|reasonable|honest|respectful|courteous|moral|polite|proper|legal|appropriate|sensitive"
    r"|accurate|considerate|decent|humane|tolerant|sincere))\b"
)
_GOOD = (
    r"(?:harmless|helpful|honest|ethical|moral|safe|truthful|accurate|polite|respectful|kind|thoughtful|wise|peaceful"
    r"|friendly|appropriate|acceptable|considerate|careful|caring|fair|good|benign|legal|lawful|responsible|suitable"
    r"|useful|sincere|decent)\b"
)
_NOUN = r"(?:harm|damage|danger|injury|hurt|offen[cs]e|suffering)\b(?!-)"
_VERB = (
    r"(?:harm|hurt|offend|insult|injure|endanger|damage|mislead|deceive|humiliate|encourage (?:harm|crime|violence))"
)
_ANSWER = (
    r"(?:of )?(?:(?:the|these|those|two|following|assistant|ai)(?:['’]s)? )*"
    r"(?:answers?|responses?|repl(?:y|ies)|ones?|options?)"
)
_IS = r"\b(?:is|are|seems?|sounds?|(?:would|could|might|may|will) be)(?:\s+\w+ly)?"
_WORSE = re.compile(
    rf"\b(?:more|(?<!\ba )most)\s+(?:\w+ly\s+)?{_BAD}|\b(?:less|least)\s+(?:\w+ly\s+)?{_GOOD}"
    rf"|\b(?:more|most|greater|greatest)\s+{_NOUN}|\b(?:more|most)\s+likely\s+to\s+(?:\w+ly\s+)?{_VERB}"
    rf"|{_IS}\s+(?:the\s+)?(?:worse|worst)\b|\bthe\s+(?:worse|worst)\s+(?:of\b|{_ANSWER})"
    r"|\b(?:rud|nasti|cruel+|mean|riski|deadli|harsh)(?:er|est)\b"
    rf"|\bwhich\s+{_ANSWER}\s+(?:{_IS}\s+{_BAD}|(?:(?:would|could|might|may|will)\s+)?{_VERB})"
    rf"|\b(?:choose|select|pick|name|identify|find|prefer)\s+the\s+{_BAD}\s+{_ANSWER}",
    re.IGNORECASE,
)
_TURNED = re.compile(
    r"\b(?:less|least|fewer|not|no|never|without|avoid\w*|refus\w+|reject\w*|prevent\w*|rather than|instead of|nothing"
    r"|unlikely|cannot|hardly|harder)\b|n['’]t\b",
    re.IGNORECASE,
)
_BAD_ZH = (
    r"(?:有害|有毒|危险|恶劣|恶毒|糟糕?|差|坏|粗鲁|冒犯|残忍|歧视|暴力|违法|虚假|误导|伤人|伤害|令人反感|说教|敷衍)"
)
_GOOD_ZH = r"(?:无害|安全|诚实|礼貌|尊重|友善|友好|体贴|合适|恰当|道德|负责|真实|准确|善良|有用|有帮助|好)"
_WORSE_ZH = re.compile(
    rf"[更最较](?:为|加|具|有|显得?|容易|可能)?{_BAD_ZH}|[更最较]不(?:够|太|加)?{_GOOD_ZH}"
    r"|(?:害处|坏处|危害|伤害|风险|危险性?)[更最较](?:多|大|高|严重)"
    rf"|哪(?:一?个|一?种|一?条)?(?:回答|回复|答案)(?:是|很|比较|会)?{_BAD_ZH}|选择?出?{_BAD_ZH}的"
)
_TURNED_ZH = re.compile(r"[不没无别勿非]|避免|防止|拒绝|更少|更难|最少|最难")
_CHOICE = re.compile(
    r"\b(?:which(?:ever)?|choose|compare|select|pick|prefer|identify|name|find|decide|better|best)\b|[哪选挑]|比较|更|最",
    re.IGNORECASE,
)


def asks_for_the_worse(question: str) -> bool:
    """Whether a question seems to ask for the more harmful, or otherwise worse, of two answers."""
    for clause in re.split(r"[.;:?!。；：？！]|,\s*(?:but|however|and)\b|，但", question):
        for markers, turned in ((_WORSE, _TURNED), (_WORSE_ZH, _TURNED_ZH)):
            for marker in markers.finditer(clause):
                if len(turned.findall(clause[: marker.start()])) % 2 == 0:
                    return True
    return False


def check_constitution(path_or_name: str | Path) -> tuple[Constitution, list[str]]:
    """What of a constitution can be read, and everything that is wrong with it.

    Args:
        path_or_name: as for `load_constitution`.

    Raises:
        ConfigError: no such file, or it is not readable or holds no principles.
    """
    found, problems = examine(read_constitution(path_or_name))
    return found, [*problems, *_blanks(found), *_repeated(found), *_doubtful_questions(found)]


def _blanks(c: Constitution) -> Iterator[str]:
    for field in ("principles", "critique_few_shots", "feedback_few_shots", "cot_few_shots"):
        for number, part in enumerate(getattr(c, field)):
            for key in sorted(part.model_fields_set):
                value = getattr(part, key)
                if isinstance(value, str) and not value.strip():
                    yield f"{field}.{number}.{key}: is given but empty"


def _repeated(c: Constitution) -> Iterator[str]:
    seen: dict[tuple[str, str], int] = {}
    for number, principle in enumerate(c.principles):
        for field in ("critique_request", "revision_request", "preference_question"):
            text = " ".join(getattr(principle, field).casefold().split())
            first = seen.setdefault((field, text), number)
            if text and first != number:
                yield f"principle {principle.id!r}: its {field} repeats that of {c.principles[first].id!r}"


def _doubtful_questions(c: Constitution) -> Iterator[str]:
    for principle in c.principles:
        question, where = principle.preference_question, f"principle {principle.id!r}"
        if question and not _CHOICE.search(question):
            yield f"{where}: the question does not read as a choice between two answers; begin it with `Which answer`"
        if re.search(r"\([AB]\)", question):
            yield f"{where}: the question names (A) or (B); leave that to the template, which shows both answers"
        if asks_for_the_worse(question) and not principle.inverted:
            yield f"{where}: the question seems to ask for the worse answer; turn it round, or set inverted: true"
