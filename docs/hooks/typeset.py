"""LaTeX of the objectives that docstrings of models write in plain text."""

import re

GREEK = ["alpha", "beta", "gamma", "delta", "kappa", "lambda", "mu", "pi", "rho", "sigma", "tau", "Sigma"]
SYMBOLS = {name: f"\\{name}" for name in GREEK} | {"lam": r"\lambda", "eps": r"\varepsilon", "I": "I", "in": r"\in "}
FUNCTIONS = {"log", "max", "min", "cosh", "exp", "det"}
OPERATORS = {"relu", "sigmoid", "sg", "stopgrad", "diag", "mean"}
SIGNS = {
    ">=": r"\ge ",
    "<=": r"\le ",
    "!=": r"\ne ",
    "->": r"\to ",
    "||": r"\|",
    "..": r"\ldots ",
    "{": r"\{",
    "}": r"\}",
}
TOKEN = re.compile(r"\s+|MS-SSIM|[A-Za-z]+|\d+(?:\.\d+)?|>=|<=|!=|->|\|\||\.\.|.")


class _Reader:
    """Reads a formula from left to right."""

    def __init__(self, text: str) -> None:
        # a step of a sequence: s_n+1 is s with the index n + 1
        text = re.sub(r"_n\+1", "_{n+1}", text)
        text = re.sub(r"_X->Z", "_{X->Z}", text)
        text = re.sub(r"_Z->X", "_{Z->X}", text)
        text = re.sub(r"_<i\b", "_{<i}", text)
        self.tokens = TOKEN.findall(text)
        self.at = 0
        # whether each open bracket is that of a function, in which a bar is a condition
        self.calls: list[bool] = []

    def peek(self, ahead: int = 0) -> str:
        place = self.at + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def all(self, end: str = "") -> str:
        out = []
        while self.at < len(self.tokens) and not (end and self.peek() == end):
            out.append(self.one())
        return "".join(out)

    def one(self) -> str:
        token = self.take()
        if token.isspace():
            return r"\; " if len(token) > 1 and self.peek() else " "
        if token[0].isalpha():
            return self.word(token)
        if token in "([":
            before = self.tokens[self.at - 2] if self.at > 1 else " "
            self.calls.append(token == "(" and bool(re.fullmatch(r"[A-Za-z\d~'^]+", before)))
            return token
        if token in ")]":
            if self.calls:
                self.calls.pop()
            return token + self.scripts()
        if token == "|" and self.calls and self.calls[-1]:
            return r" \mid "
        if token == "||":
            return SIGNS[token] + (self.scripts() if not self.peek(-2).isspace() else "")
        if token[0].isdigit():
            if self.peek() == "/" and re.fullmatch(r"[A-Za-z]|\d+", self.peek(1)) and self.peek(2) not in ("_", "^"):
                self.take()
                return rf"\tfrac{{{token}}}{{{self.take()}}}"
            return token + self.scripts()
        return SIGNS.get(token, token)

    def word(self, name: str) -> str:
        """A name with its hat, tilde, primes, subscripts and superscripts."""
        if name == "E" and self.peek() == "_":
            self.take()
            return rf"\mathbb{{E}}_{{{self.distribution()}}}"
        if name == "E" and self.peek() in ("[", " ") and self.peek(1) != ")":
            return r"\mathbb{E}" + ("\\," if self.peek() == " " else "")
        if name == "sum":
            return r"\sum" + self.scripts()
        if name == "N" and self.peek() == "(":
            return r"\mathcal{N}"
        if name in FUNCTIONS:
            return rf"\{name}" + (self.scripts() or " ")
        if name in OPERATORS:
            return rf"\operatorname{{{name}}}" + self.scripts()
        hat = ""
        if name.endswith("hat") and len(name) > 3:
            name, hat = name[:-3], r"\hat"
        if self.peek() == "_" and self.peek(1) == "hat":
            self.at += 2
            hat = r"\hat"
        if self.peek() == "~":
            self.take()
            hat = r"\tilde"
        if self.peek() == "^" and not re.match(r"[\w({]", self.peek(1)):
            self.take()
            hat = r"\hat"
        # a name of two words, such as free_bits
        if (
            len(name) > 1
            and name.islower()
            and name not in (*SYMBOLS, "dz")
            and self.peek() == "_"
            and len(self.peek(1)) > 2
        ):
            self.take()
            name = rf"{name}\_{self.take()}"
        base = SYMBOLS.get(name) or (name if len(name) == 1 else self.long(name))
        written = f"{hat}{{{base}}}" if hat else base
        if len(name) == 1 and self.peek().isdigit():
            return f"{written}_{{{self.take()}}}"
        return written + (self.scripts() or (" " if name in SYMBOLS else ""))

    def long(self, name: str) -> str:
        if re.fullmatch(r"d[a-z]|MK", name):
            return name
        if name in ("with", "tokens", "at", "over", "of", "positions", "mask"):
            return rf"\;\text{{{name}}}\;"
        return rf"\mathrm{{{name}}}"

    def scripts(self) -> str:
        out = ""
        while self.peek() in ("_", "^", "'"):
            mark = self.take()
            if mark == "'":
                out += mark
            elif out.count(mark):
                # a second subscript, as in x_hat_m
                out = out[:-1] + "," + self.script() + "}"
            else:
                out += f"{mark}{{{self.script()}}}"
        return out

    def script(self) -> str:
        token = self.take()
        if token in "({":
            inner = self.all(")" if token == "(" else "}")
            if self.at < len(self.tokens):
                self.take()
            return inner.strip()
        if token.isalpha():
            tilde = self.peek() == "~" and self.take()
            name = SYMBOLS.get(token) or (token if len(token) < 3 or token == "kjj" else rf"\mathrm{{{token}}}")
            return rf"\tilde{{{name}}}" if tilde else name
        return token

    def distribution(self) -> str:
        """What an expectation is over, such as q, q_i, q(z|x) or sg(q)."""
        name = self.take()
        base = rf"\operatorname{{{name}}}" if name in OPERATORS else SYMBOLS.get(name, name)
        if self.peek() == "~":
            self.take()
            base = rf"\tilde{{{base}}}"
        if self.peek() == "_":
            self.take()
            base += f"_{{{self.take()}}}"
        if self.peek() == "(":
            self.take()
            self.calls.append(True)
            base += f"({self.all(')')})"
            self.calls.pop()
            self.take()
        return base


def latex(formula: str) -> str:
    """The LaTeX of a formula in the notation of the models' docstrings."""
    return re.sub(r" +", " ", _Reader(formula.strip()).all()).strip()
