"""Write the golden plans anew: python -m tests.golden"""

from tests.golden import cases


def rewrite() -> None:
    """Write every file, and say which ones changed."""
    for path, text in cases.texts():
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{'rewrote' if changed else 'same   '} {path.name}")


if __name__ == "__main__":
    rewrite()
