// Upstream accounts: one epoll thread that answers chat requests of OpenAI and Anthropic on several ports.
//
//   mock TICK_US CHUNKS PORT...
//
// An answer in one piece is sent at once. A body with "stream":true gets events: head and first chunk at once, one
// chunk more each tick, then, in one write, what ends the stream: the finish reason, the usage, and [DONE].
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum { MOST_FDS = 1 << 16, MOST_CHUNKS = 500, READ_ROOM = 1 << 16, EVENTS = 512, SEARCHED = 4096 };
enum { OPENAI, ANTHROPIC, DIALECTS };

typedef struct {
  int fd, is_streaming, dialect, slot;
  int next_chunk;
  size_t length, capacity;
  char *data;  // of requests that are not answered yet
} connection;

static connection *connections[MOST_FDS], *streaming[MOST_FDS];
static int is_listener[MOST_FDS], streaming_count, chunk_count;
static char *answers[DIALECTS], *chunks[DIALECTS][MOST_CHUNKS + 1], *models;
static const char *STREAM_HEAD =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    "Transfer-Encoding: chunked\r\n\r\n";

#define OPENAI_CHUNK \
  "data: {\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000," \
  "\"model\":\"mock-model\",\"choices\":"
#define USAGE "\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":50,\"total_tokens\":150}"

__attribute__((format(printf, 1, 2))) static char *format(const char *template, ...) {
  char *text;
  va_list arguments;
  va_start(arguments, template);
  if (vasprintf(&text, template, arguments) < 0) exit(1);
  va_end(arguments);
  return text;
}

static char *whole(const char *body) {
  return format("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", strlen(body),
                body);
}

static char *chunk(const char *data) { return format("%zx\r\n%s\r\n", strlen(data), data); }

static void make_answers(void) {
  char text[513];
  for (int i = 0; i < 512; i++) text[i] = i % 7 == 6 ? ' ' : 'a';
  text[512] = 0;
  answers[OPENAI] = whole(
      format("{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"mock-model\","
             "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\"},"
             "\"finish_reason\":\"stop\"}]," USAGE "}",
             text));
  answers[ANTHROPIC] = whole(
      format("{\"id\":\"msg_mock\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"mock-model\","
             "\"content\":[{\"type\":\"text\",\"text\":\"%s\"}],\"stop_reason\":\"end_turn\","
             "\"usage\":{\"input_tokens\":100,\"output_tokens\":50}}",
             text));
  // Whatever is asked with GET: routers look for health, models and the server's kind before they use a worker.
  models = whole(
      "{\"status\":\"ok\",\"object\":\"list\",\"model_path\":\"mock-model\",\"served_model_name\":\"mock-model\","
      "\"data\":[{\"id\":\"mock-model\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"mock\","
      "\"max_model_len\":32768}]}");
}

static void make_chunks(void) {
  for (int i = 0; i < chunk_count; i++) {
    chunks[OPENAI][i] =
        chunk(format(OPENAI_CHUNK "[{\"index\":0,\"delta\":{%s\"content\":\" token%d\"},\"finish_reason\":null}]}\n\n",
                     i ? "" : "\"role\":\"assistant\",", i));
    chunks[ANTHROPIC][i] = chunk(format(
        "%sevent: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":0,"
        "\"delta\":{\"type\":\"text_delta\",\"text\":\" token%d\"}}\n\n",
        i ? ""
          : "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_mock\","
            "\"type\":\"message\",\"role\":\"assistant\",\"model\":\"mock-model\",\"content\":[],"
            "\"usage\":{\"input_tokens\":100,\"output_tokens\":1}}}\n\n"
            "event: content_block_start\ndata: {\"type\":\"content_block_start\",\"index\":0,"
            "\"content_block\":{\"type\":\"text\",\"text\":\"\"}}\n\n",
        i));
  }
  chunks[OPENAI][chunk_count] =
      format("%s0\r\n\r\n", chunk(OPENAI_CHUNK "[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n"
                                               OPENAI_CHUNK "[]," USAGE "}\n\ndata: [DONE]\n\n"));
  chunks[ANTHROPIC][chunk_count] = format(
      "%s0\r\n\r\n",
      chunk("event: content_block_stop\ndata: {\"type\":\"content_block_stop\",\"index\":0}\n\n"
            "event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},"
            "\"usage\":{\"output_tokens\":50}}\n\n"
            "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"));
}

// Answers are small: a full buffer means a client that does not read, which may wait.
static void put(connection *c, const char *data) {
  size_t left = strlen(data);
  while (left) {
    ssize_t wrote = send(c->fd, data, left, MSG_NOSIGNAL);
    if (wrote < 0 && errno == EAGAIN) {
      usleep(50);
      continue;
    }
    if (wrote < 0) return;
    data += wrote;
    left -= (size_t)wrote;
  }
}

static void begin_stream(connection *c) {
  char *start = format("%s%s", STREAM_HEAD, chunks[c->dialect][0]);
  put(c, start);
  free(start);
  c->next_chunk = 1;
  if (c->is_streaming) return;
  c->is_streaming = 1;
  c->slot = streaming_count;
  streaming[streaming_count++] = c;
}

static void end_stream(connection *c) {
  if (!c->is_streaming) return;
  c->is_streaming = 0;
  streaming[c->slot] = streaming[--streaming_count];
  streaming[c->slot]->slot = c->slot;
}

static void drop(connection *c) {
  end_stream(c);
  close(c->fd);
  connections[c->fd] = 0;
  free(c->data);
  free(c);
}

// The value of the header of that lower-case name with its colon, 0 without it.
static char *header(char *head, size_t length, const char *name) {
  size_t n = strlen(name);
  for (char *p = head; (p = memchr(p, '\n', (size_t)(head + length - p)));) {
    p++;
    if (p + n < head + length && !strncasecmp(p, name, n)) return p + n;
  }
  return 0;
}

static int asks_for_a_stream(const char *body, size_t length) {
  const char *p = memmem(body, length, "\"stream\":", 9);
  if (!p) return 0;
  p += 9;
  return *(*p == ' ' ? p + 1 : p) == 't';
}

// Answers the request at the start of the buffer; 0 if it is not whole yet.
static int answer(connection *c) {
  char *head_end = memmem(c->data, c->length, "\r\n\r\n", 4), *value;
  if (!head_end) return 0;
  size_t head_length = (size_t)(head_end - c->data) + 4, length = head_length;
  if ((value = header(c->data, head_length, "content-length:"))) {
    length += strtoul(value, 0, 10);
  } else if (header(c->data, head_length, "transfer-encoding:")) {
    char *end = memmem(c->data + head_length, c->length - head_length, "0\r\n\r\n", 5);
    if (!end) return 0;
    length = (size_t)(end - c->data) + 5;
  }
  if (c->length < length) return 0;
  if (c->data[0] == 'G') {
    put(c, models);
  } else {
    char *line_end = memchr(c->data, '\r', head_length);
    c->dialect = memmem(c->data, (size_t)(line_end - c->data), "/messages", 9) ? ANTHROPIC : OPENAI;
    // The field stands at one end of a body, and a long one is not searched whole.
    char *body = c->data + head_length;
    size_t body_length = length - head_length, part = body_length < SEARCHED ? body_length : SEARCHED;
    if (asks_for_a_stream(body, part) || (body_length > part && asks_for_a_stream(body + body_length - part, part)))
      begin_stream(c);
    else
      put(c, answers[c->dialect]);
  }
  memmove(c->data, c->data + length, c->length - length);
  c->length -= length;
  return 1;
}

static void receive(connection *c) {
  if (c->capacity - c->length < READ_ROOM) {
    c->capacity *= 2;
    c->data = realloc(c->data, c->capacity);
  }
  ssize_t got = recv(c->fd, c->data + c->length, c->capacity - c->length, 0);
  if (got < 0 && errno == EAGAIN) return;
  if (got <= 0) {
    drop(c);
    return;
  }
  c->length += (size_t)got;
  while (c->length && answer(c)) {
  }
}

static void watch(int poller, int fd) {
  struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
  epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

static void accept_all(int poller, int listener) {
  int fd, yes = 1;
  while ((fd = accept4(listener, 0, 0, SOCK_NONBLOCK)) >= 0) {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->capacity = READ_ROOM;
    c->data = malloc(c->capacity);
    connections[fd] = c;
    watch(poller, fd);
  }
}

static int listen_on(int port) {
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), yes = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
    perror("listen");
    exit(1);
  }
  is_listener[fd] = 1;
  return fd;
}

static void tick(int timer) {
  uint64_t times;
  if (read(timer, &times, sizeof times) < 0) return;
  for (int i = streaming_count - 1; i >= 0; i--) {
    connection *c = streaming[i];
    int is_last = c->next_chunk == chunk_count;
    put(c, chunks[c->dialect][c->next_chunk++]);
    if (is_last) end_stream(c);
  }
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "mock TICK_US CHUNKS PORT...\n");
    return 2;
  }
  long tick_us = atol(argv[1]);
  chunk_count = atoi(argv[2]) < MOST_CHUNKS ? atoi(argv[2]) : MOST_CHUNKS;
  signal(SIGPIPE, SIG_IGN);
  make_answers();
  make_chunks();
  int poller = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), is_armed = 0;
  struct itimerspec on = {{tick_us / 1000000, tick_us % 1000000 * 1000}, {0, 1000}}, off = {{0, 0}, {0, 0}};
  watch(poller, timer);
  for (int i = 3; i < argc; i++) watch(poller, listen_on(atoi(argv[i])));
  struct epoll_event events[EVENTS];
  for (;;) {
    if (is_armed != (streaming_count > 0)) {
      is_armed = streaming_count > 0;
      timerfd_settime(timer, 0, is_armed ? &on : &off, 0);
    }
    int ready = epoll_wait(poller, events, EVENTS, -1);
    for (int i = 0; i < ready; i++) {
      int fd = events[i].data.fd;
      if (fd == timer) tick(timer);
      else if (is_listener[fd]) accept_all(poller, fd);
      else if (connections[fd]) receive(connections[fd]);
    }
  }
}
