// Asks a skyloom server by OpenAI's JavaScript client, unchanged. Exits 1 at the first answer that is not as it should be.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ maxRetries: 0 });
const passed = [];
const step = async (name, work) => {
  await work();
  passed.push(name);
};

let video;
await step("create, defaults", async () => {
  video = await client.videos.create({ prompt: "a cat on the beach" });
  assert.equal(video.model, "sora-2");
  assert.equal(video.seconds, "4");
  assert.equal(video.requested_size, "720x1280");
});
await step("create with our own fields and a picture", async () => {
  const png = Buffer.from("89504e470d0a1a0a", "hex");
  const picture = await toFile(Buffer.concat([png, Buffer.alloc(64)]), "a.png", { type: "image/png" });
  const made = await client.videos.create({ prompt: "a cat", seconds: "2", seed: 7, input_reference: picture });
  assert.equal(made.seed, 7);
  await client.videos.delete(made.id);
});
await step("poll", async () => {
  do {
    await new Promise((resolve) => setTimeout(resolve, 500));
    video = await client.videos.retrieve(video.id);
  } while (["queued", "in_progress"].includes(video.status));
  assert.equal(video.status, "completed", JSON.stringify(video.error));
  assert.equal(video.progress, 100);
});
await step("download", async () => {
  for (const [variant, type] of [["video", "video/mp4"], ["thumbnail", "image/webp"], ["spritesheet", "image/jpeg"]]) {
    const answer = await client.videos.downloadContent(video.id, { variant });
    assert.equal(answer.headers.get("content-type"), type);
    assert.ok((await answer.arrayBuffer()).byteLength > 500);
  }
});
await step("list pages", async () => {
  const ids = [];
  for await (const one of client.videos.list({ limit: 1 })) ids.push(one.id);
  assert.ok(ids.includes(video.id));
});
await step("remix", async () => {
  const remixed = await client.videos.remix(video.id, { prompt: "a dog" });
  assert.equal(remixed.remixed_from_video_id, video.id);
  assert.equal((await client.videos.delete(remixed.id)).deleted, true);
});
await step("errors", async () => {
  await assert.rejects(client.videos.retrieve("video_none"), (error) => error.status === 404 && !!error.requestID);
  await assert.rejects(client.videos.create({ prompt: "a", model: "sora-9" }), (error) => error.param === "model");
});
await step("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.ok(ids.includes("sora-2") && ids.includes("diorama"));
});
console.log(passed.join("\n"));
