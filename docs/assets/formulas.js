// MathML, which browsers show with fonts of the system, so that no fonts or styles are needed
document$.subscribe(() => {
  for (const element of document.querySelectorAll(".formula:not(.typeset)")) {
    katex.render(element.textContent, element, { displayMode: true, output: "mathml" });
    element.classList.add("typeset");
  }
});
