// The page's pure functions; run by tests/web/test_scripts.py with `node --test`.
import assert from "node:assert/strict";
import test from "node:test";
import { asCode, duration, elapsed, eventReader, merge, number, put, remaining, size, smooth } from "../../api/ui/static/js/lib.js";

test("smoothing is an average without a bias at its start, and none at 0", () => {
  assert.deepEqual(smooth([3, 1, 2], 0), [3, 1, 2]);
  assert.deepEqual(smooth([5, 5, 5], 0.9).map((value) => Number(value.toFixed(9))), [5, 5, 5]);
  const [first, second] = smooth([1, 3], 0.5);
  assert.equal(first, 1);
  assert.ok(Math.abs(second - 7 / 3) < 1e-9);
  assert.deepEqual(smooth([null, 2], 0.5), [null, 2]);
});

test("numbers, sizes and durations are written short", () => {
  assert.equal(number(1234567), "1\u202f234\u202f567");
  assert.equal(number(0.123456), "0.1235");
  assert.equal(number(undefined), "–");
  assert.equal(size(1_500_000), "1.5 MB");
  assert.equal(duration(59.6), "1 min 0 s");
  assert.equal(duration(3700), "1 h 1 min");
});

test("server-sent events are cut wherever the network cuts them", () => {
  const read = eventReader();
  assert.deepEqual(read("data: {\"a\""), []);
  assert.deepEqual(read(": 1}\n\ndata: [DONE]\n"), ['{"a": 1}']);
  assert.deepEqual(read("\n"), ["[DONE]"]);
});

test("points are merged by step, the newer one wins", () => {
  assert.deepEqual(merge([{ step: 1, v: 1 }, { step: 2, v: 1 }], [{ step: 2, v: 2 }, { step: 3, v: 2 }]), [{ step: 1, v: 1 }, { step: 2, v: 2 }, { step: 3, v: 2 }]);
});

test("the remaining time follows from the newest steps, and is unknown at first", () => {
  assert.equal(remaining([{ step: 1, at: 0 }, { step: 9, at: 8 }], 100), null);
  assert.equal(remaining([{ step: 10, at: 0 }, { step: 20, at: 20 }], 100), 160);
  assert.equal(remaining([], 100), null);
});

test("the time since the first step never goes back", () => {
  assert.deepEqual(elapsed([{ recorded_at: 100 }, { recorded_at: 103 }, { recorded_at: 102 }, { recorded_at: 110 }]), [0, 3, 3, 10]);
  assert.deepEqual(elapsed([]), []);
});

test("nested fields become a nested body", () => {
  assert.deepEqual(put(put({}, "peft.r", 8), "peft.alpha", 16), { peft: { r: 8, alpha: 16 } });
});

test("the code that is shown is a call of the same job", () => {
  const body = { model: "m", training_file: "f", suffix: "it's", peft: { type: "lora", use_rslora: true } };
  assert.deepEqual(JSON.parse(asCode("JSON", body, "")), body);
  assert.match(asCode("curl", body, "http://x"), /http:\/\/x\/v1\/fine_tuning\/jobs/);
  assert.match(asCode("curl", body, ""), /it'\\''s/);
  assert.match(asCode("Python", body, ""), /model="m",[\s\S]*"use_rslora": True/);
});
