import { once } from "node:events";
import { Worker } from "node:worker_threads";

/** Threads that take one task after the other. */
export class Pool {
  constructor(size) {
    this.workers = Array.from({ length: size }, () => new Worker(new URL("./worker.mjs", import.meta.url)));
  }

  /** Results of all tasks, in their order; `onResult(task)` is called after each. The first error is thrown. */
  async run(tasks, onResult = () => {}) {
    const results = new Array(tasks.length);
    let next = 0;
    const work = async (worker) => {
      while (next < tasks.length) {
        const index = next++;
        worker.postMessage(tasks[index]);
        [results[index]] = await once(worker, "message");
        onResult(tasks[index]);
      }
    };
    await Promise.all(this.workers.map(work));
    return results;
  }

  close() {
    return Promise.all(this.workers.map((worker) => worker.terminate()));
  }
}
