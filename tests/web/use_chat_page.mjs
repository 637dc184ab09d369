// A page with useChat({ resume: true }): prints its messages and its status whenever they change, one state a line.
//   node use_chat_page.mjs API CHAT MESSAGES
import { JSDOM } from 'jsdom';

const [, , api, id, messages] = process.argv;
const { window } = new JSDOM('<div id="page"></div>', { url: api });
globalThis.window = window;
globalThis.document = window.document;
if (!('navigator' in globalThis)) globalThis.navigator = window.navigator;
const { createElement, useEffect } = await import('react');
const { createRoot } = await import('react-dom/client');
const { useChat } = await import('@ai-sdk/react');
const { DefaultChatTransport } = await import('ai');

const transport = new DefaultChatTransport({ api });
let streamed = false;

function Page() {
  const chat = useChat({ id, transport, resume: true, messages: JSON.parse(messages) });
  useEffect(() => {
    console.log(
      JSON.stringify({ messages: chat.messages, status: chat.status, error: chat.error?.message }),
    );
    streamed ||= chat.status === 'streaming';
    if (chat.status === 'error' || (streamed && chat.status === 'ready')) process.exit(0);
  }, [chat.messages, chat.status]);
  return null;
}

createRoot(window.document.getElementById('page')).render(createElement(Page));
