"""Write the golden plans anew: python -m tests.golden"""

from tests.golden import cases

if __name__ == "__main__":
    for path, text in cases.texts():
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{'rewrote' if changed else 'same   '} {path.relative_to(cases.FOLDER.parents[1])}")
