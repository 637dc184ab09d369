// Reads a stream to its end with the client of the protocol, and prints its text.
import { stream } from "@durable-streams/client";

const [url, live] = process.argv.slice(2);
const response = await stream({ url, offset: "-1", live });
for await (const text of response.textStream()) process.stdout.write(text);
