// Vercel's AI SDK before the HTTP front end: node scripts/ai_sdk_client.mjs http://127.0.0.1:8000/v1
// Needs `ai` and `@ai-sdk/openai-compatible` where node finds them; scripts/check_http.py installs them and runs this.
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const [baseURL] = process.argv.slice(2);
const name = (await (await fetch(`${baseURL}/models`)).json()).data[0].id;
const model = createOpenAICompatible({ name: "jaxserve", baseURL, includeUsage: true })(name);
const asked = { model, prompt: "What is the capital of France?", temperature: 0, maxOutputTokens: 12, maxRetries: 0 };

const whole = await generateText(asked);
assert.ok(whole.text && whole.usage.outputTokens > 0 && whole.usage.outputTokens <= 12);
assert.ok(["stop", "length"].includes(whole.finishReason));

const stream = streamText(asked);
let text = "";
for await (const part of stream.textStream) text += part;
assert.equal(text, whole.text);
assert.deepEqual((await stream.usage).outputTokens, whole.usage.outputTokens);

await assert.rejects(generateText({ ...asked, topP: 2 }), (error) => {
  assert.equal(error.statusCode, 400);
  return true;
});
console.log(`ok: ${name}: ${JSON.stringify(text)}`);
