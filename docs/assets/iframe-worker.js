// Browsers start no workers for pages opened from a disk: the search's worker then runs in a hidden frame.
// The theme looks for the name IFrameWorker and waits for the promise of importScripts.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((resolve) => {
        this.frame.addEventListener("load", resolve);
      });
      const prelude = `
        const outside = parent;
        window.postMessage = (data) => outside.postMessage(data, "*");
        window.importScripts = async (...urls) => {
          for (const url of urls) {
            await new Promise((resolve, reject) => {
              const script = document.createElement("script");
              Object.assign(script, { src: url, onload: resolve, onerror: reject });
              document.head.append(script);
            });
          }
        };`;
      this.frame.srcdoc = `<script>${prelude}</scr` + `ipt><script src="${new URL(url, location)}"></scr` + "ipt>";
      this.listener = (event) => {
        if (event.source === this.frame.contentWindow) {
          const message = new MessageEvent("message", { data: event.data });
          this.dispatchEvent(message);
          this.onmessage?.(message);
        }
      };
      addEventListener("message", this.listener);
      document.body.append(this.frame);
    }

    async postMessage(data) {
      await this.ready;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {
      removeEventListener("message", this.listener);
      this.frame.remove();
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker;
}
