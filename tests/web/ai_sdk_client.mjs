// A client of the AI SDK: prints each state of the message that it is reading, one a line.
//   node ai_sdk_client.mjs send|resume API CHAT
import { DefaultChatTransport, readUIMessageStream } from 'ai';

const [, , what, api, chatId] = process.argv;
const say = (value) => console.log(JSON.stringify(value));
const transport = new DefaultChatTransport({ api });
const asked = { id: 'u1', role: 'user', parts: [{ type: 'text', text: 'Hi' }] };
const stream =
  what === 'send'
    ? await transport.sendMessages({ trigger: 'submit-message', chatId, messages: [asked] })
    : await transport.reconnectToStream({ chatId });
if (stream === null) {
  say({ nothing: true });
} else {
  const kinds = [];
  const seen = stream.pipeThrough(
    new TransformStream({
      transform(chunk, controller) {
        kinds.push(chunk.type);
        controller.enqueue(chunk);
      },
    }),
  );
  let error = null;
  const messages = readUIMessageStream({ stream: seen, onError: (each) => (error = each.message) });
  for await (const message of messages) say({ message });
  say({ kinds, error });
}
