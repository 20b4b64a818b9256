// Run token rows through llama.cpp, with LoRA adapters, and write the logits after each row.
//
//     node tools/llama_cpp_logits.mjs PLAN.json
//
// PLAN: {"library": folder of the npm package node-llama-cpp, "model": GGUF file, "threads", "greedy": number
// of tokens that are generated after each row, "out": file for the logits (float32, a row of the
// vocabulary for each row of tokens), "runs": [{"adapters": [files], "rows": [[token ids]]}]}.
// Prints {"llama_cpp", "texts": [[token ids generated after each row]], "encoded": [[ids of "prompts"]]}.

import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const plan = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
const {getLlama} = await import(pathToFileURL(path.join(plan.package, "dist", "index.js")).href);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: plan.threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: plan.model, gpuLayers: 0});
const out = fs.openSync(plan.out, "w");
const plain = {temperature: 1, topK: 0, topP: 1, minP: 0}; // logits as the model gives them
const texts = [];

for (const run of plan.runs) {
    const context = await model.createContext({
        contextSize: 512, threads: plan.threads, flashAttention: false,
        // float32, as transformers keeps keys and values: llama.cpp's own default is float16
        experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        lora: {adapters: run.adapters.map((filePath) => ({filePath, scale: 1}))}
    });
    const sequence = context.getSequence();
    for (const row of run.rows) {
        await sequence.clearHistory();
        const last = row.length - 1;
        const items = row.map((id, i) => i < last ? id : [id, {generateNext: {logits: true, options: plain}}]);
        const {logits} = (await sequence.controlledEvaluate(items))[last].next;
        const values = new Float32Array(logits.size);
        for (const [id, logit] of logits) values[id] = logit;
        fs.writeSync(out, Buffer.from(values.buffer));

        const text = [values.indexOf(values.reduce((a, b) => Math.max(a, b)))];
        while (text.length < plan.greedy) {
            const item = [text.at(-1), {generateNext: {token: true, options: {temperature: 0}}}];
            text.push((await sequence.controlledEvaluate([item]))[0].next.token);
        }
        texts.push(text);
    }
    await context.dispose();
}
fs.closeSync(out);
const encoded = plan.prompts.map((prompt) => model.tokenize(prompt));
console.log(JSON.stringify({llama_cpp: llama.llamaCppRelease.release, texts, encoded}));
process.exit(0);
