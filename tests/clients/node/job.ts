// The README's main job with the types that openapi-typescript generates: an agent does a task.
import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { paths } from "./corral.js";

const client = createClient<paths>({
  baseUrl: process.env.CORRAL_ADDRESS!,
  headers: { Authorization: `Bearer ${process.env.CORRAL_KEY}` },
});

const { data: agent, error } = await client.POST("/api/v1/agents", { body: { name: "Echo of the TypeScript client" } });
if (!agent) throw new Error(error.detail);
await client.POST("/api/v1/agents/{id}/start", { params: { path: { id: agent.id } } });

const { data: task, error: refused } = await client.POST("/api/v1/tasks", {
  body: { title: "Say hello", instructions: "Hello, world", agent_id: agent.id },
});
if (!task) throw new Error(refused.code);
const { data: done } = await client.GET("/api/v1/tasks/{id}", {
  params: { path: { id: task.id }, query: { wait: 30 } },
});
assert.ok(done);
const status: string = done.status;
assert.deepEqual([status, done.attempt, done.result], ["completed", 1, { text: "Hello, world" }]);

const { data: nothing, error: missing } = await client.GET("/api/v1/agents/{id}", { params: { path: { id: task.id } } });
assert.equal(nothing, undefined);
const code: "not_found" | string = missing!.code;
assert.equal(code, "not_found");
console.log("done");
