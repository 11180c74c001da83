// The Vercel AI SDK, which has no call that lists a server's models.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const corral = createOpenAICompatible({
  name: "corral",
  baseURL: process.env.CORRAL_URL,
  apiKey: process.env.CORRAL_KEY,
  includeUsage: true,
});

const whole = await generateText({ model: corral("scripted/echo"), prompt: "Hello" });
assert.equal(whole.text, "Hello");
assert.ok(whole.usage.totalTokens > 0);

const streamed = streamText({ model: corral("scripted/echo"), prompt: "Hello there" });
let text = "";
for await (const part of streamed.textStream) text += part;
assert.equal(text, "Hello there");
assert.ok((await streamed.usage).outputTokens > 0);

const weather = tool({
  description: "Tell the weather of a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `rain in ${city}`,
});
const called = await generateText({
  model: corral("scripted/weather"),
  prompt: "How is the weather?",
  tools: { weather },
  stopWhen: stepCountIs(3),
});
assert.equal(called.text, "It rains.");
assert.equal(called.steps[0].toolResults[0].output, "rain in Bern");

const { embeddings } = await embedMany({ model: corral.embeddingModel("scripted/words"), values: ["red", "blue"] });
assert.equal(embeddings.length, 2);

await assert.rejects(generateText({ model: corral("nobody/nothing"), prompt: "Hello" }), (error) => {
  assert.equal(error.statusCode, 404);
  return /There is no model nobody\/nothing/.test(error.message);
});

console.log("ai", JSON.parse(readFileSync("node_modules/ai/package.json")).version);
