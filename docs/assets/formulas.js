// MathML, which browsers show with fonts of the system, so that no fonts or styles are needed
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".formula:not(.typeset)")) {
    katex.render(element.textContent, element, { displayMode: element.tagName === "DIV", output: "mathml" });
    // browsers know these letters as characters of their own only
    for (const letter of element.querySelectorAll("mi[mathvariant]")) {
      const styled = { "double-struck E": "𝔼", "script N": "𝒩" };
      letter.textContent = styled[`${letter.getAttribute("mathvariant")} ${letter.textContent}`] ?? letter.textContent;
    }
    element.classList.add("typeset");
  }
});
