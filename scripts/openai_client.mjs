// The official JavaScript client of the HTTP front end: node scripts/openai_client.mjs http://127.0.0.1:8000/v1 [API_KEY]
// Needs the `openai` package where node finds it; scripts/check_http.py installs it and runs this.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const models = (await client.models.list()).data.map((model) => model.id);
assert.ok(models.length > 0);
const model = models[0];
const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model, temperature: 0, max_tokens: 12 };

const completion = await client.completions.create({ ...greedy, prompt: "1 2 3", logprobs: 1 });
assert.equal(typeof completion.choices[0].text, "string");
assert.equal(completion.choices[0].logprobs.tokens.length, completion.usage.completion_tokens);

let text = "";
for await (const chunk of await client.completions.create({ ...greedy, prompt: "1 2 3", stream: true })) {
  text += chunk.choices[0].text;
}
assert.equal(text, completion.choices[0].text);

const chat = await client.chat.completions.create({ ...greedy, messages });
const usage = [];
text = "";
const stream = await client.chat.completions.create({
  ...greedy,
  messages,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) usage.push(chunk.usage);
}
assert.equal(text, chat.choices[0].message.content);
assert.deepEqual(usage, [{ ...chat.usage, prompt_tokens_details: usage[0].prompt_tokens_details }]);

const runner = client.chat.completions.stream({ ...greedy, messages });
assert.equal((await runner.finalMessage()).content, text);

const left = await client.chat.completions.create({ ...greedy, max_tokens: 64, messages, stream: true });
for await (const chunk of left) {
  assert.ok(chunk.id);
  break; // the client closes the connection
}

await assert.rejects(client.chat.completions.create({ ...greedy, temperature: -1, messages }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "temperature");
  return true;
});
await assert.rejects(client.completions.create({ ...greedy, model: "nobody", prompt: "a" }), OpenAI.NotFoundError);
console.log(`ok: ${model}: ${JSON.stringify(text)}`);
