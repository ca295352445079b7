/* The footer of a Parquet file: where the column chunks are that it describes.
 *
 * Source: parquet-format, parquet.thrift (FileMetaData, RowGroup, ColumnChunk, ColumnMetaData); thrift-compact-protocol.md
 */
#include "loops.h"

enum { STOP, TRUE_, FALSE_, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT };
enum { MAX_DEPTH = 16 };

typedef struct {
	const uint8_t *data;
	int64_t n, at;
	int bad;
} Reader;

static uint8_t byte_of(Reader *reader)
{
	if (reader->at >= reader->n) {
		reader->bad = 1;
		return 0;
	}
	return reader->data[reader->at++];
}

static uint64_t varint(Reader *reader)
{
	uint64_t value = 0;

	for (int shift = 0; shift < 70; shift += 7) {
		uint8_t byte = byte_of(reader);

		if (shift < 64)
			value |= (uint64_t)(byte & 0x7F) << shift;
		if (byte < 0x80)
			return value;
	}
	reader->bad = 1;
	return 0;
}

static int64_t zigzag(Reader *reader)
{
	uint64_t value = varint(reader);

	return (int64_t)(value >> 1) ^ -(int64_t)(value & 1);
}

/* Go on to the next field of a struct: its type, STOP behind the last one. */
static int next_field(Reader *reader, int64_t *field)
{
	uint8_t head = byte_of(reader);

	if (reader->bad || (head & 15) == STOP)
		return STOP;
	if (head >> 4)
		*field = (int16_t)(*field + (head >> 4));
	else
		*field = (int16_t)zigzag(reader);
	return reader->bad ? STOP : head & 15;
}

/* Begin a list; return how many elements follow. */
static uint64_t list_size(Reader *reader, int *kind)
{
	uint8_t head = byte_of(reader);

	*kind = head & 15;
	return head >> 4 == 15 ? varint(reader) : head >> 4;
}

static void skip(Reader *reader, int kind, int in_list, int depth);

static void skip_elements(Reader *reader, int kind, uint64_t count, int depth)
{
	for (uint64_t i = 0; i < count && !reader->bad; i++) /* each takes a byte at least */
		skip(reader, kind, 1, depth + 1);
}

static void skip_map(Reader *reader, int depth)
{
	uint64_t count = varint(reader);
	uint8_t kinds = count ? byte_of(reader) : 0;

	for (uint64_t i = 0; i < count && !reader->bad; i++) {
		skip(reader, kinds >> 4, 1, depth + 1);
		skip(reader, kinds & 15, 1, depth + 1);
	}
}

static void skip_bytes(Reader *reader, uint64_t count)
{
	if (count > (uint64_t)(reader->n - reader->at))
		reader->bad = 1;
	else
		reader->at += (int64_t)count;
}

static void skip(Reader *reader, int kind, int in_list, int depth)
{
	int64_t field = 0;
	uint64_t count;
	int of;

	if (depth > MAX_DEPTH) {
		reader->bad = 1;
		return;
	}
	switch (kind) {
	case TRUE_:
	case FALSE_:
		skip_bytes(reader, (uint64_t)in_list); /* a field's value is its type */
		break;
	case BYTE:
		skip_bytes(reader, 1);
		break;
	case I16:
	case I32:
	case I64:
		varint(reader);
		break;
	case DOUBLE:
		skip_bytes(reader, 8);
		break;
	case BINARY:
		skip_bytes(reader, varint(reader));
		break;
	case LIST:
	case SET:
		count = list_size(reader, &of);
		skip_elements(reader, of, count, depth);
		break;
	case MAP:
		skip_map(reader, depth);
		break;
	case STRUCT:
		while (!reader->bad && (of = next_field(reader, &field)) != STOP)
			skip(reader, of, 0, depth + 1);
		break;
	default:
		reader->bad = 1;
	}
}

/* ColumnMetaData */
static void read_meta_data(Reader *reader, int64_t *chunk)
{
	int64_t field = 0, *value;
	int kind;

	while (!reader->bad && (kind = next_field(reader, &field)) != STOP) {
		value = field == 4 ? chunk : field == 7 ? chunk + 1 : field == 9 ? chunk + 2 : field == 11 ? chunk + 3 : NULL;
		if (value && (kind == I32 || kind == I64))
			*value = zigzag(reader);
		else
			skip(reader, kind, 0, 3);
	}
}

static void read_chunk(Reader *reader, int64_t *chunk)
{
	int64_t field = 0;
	int kind;

	while (!reader->bad && (kind = next_field(reader, &field)) != STOP)
		if (field == 3 && kind == STRUCT)
			read_meta_data(reader, chunk);
		else
			skip(reader, kind, 0, 2);
}

static void read_group(Reader *reader, int64_t n_columns, int64_t *chunks)
{
	int64_t field = 0, n_found = 0;
	int kind, of;

	while (!reader->bad && (kind = next_field(reader, &field)) != STOP) {
		if (field != 1 || kind != LIST) {
			skip(reader, kind, 0, 1);
			continue;
		}
		if (n_found || list_size(reader, &of) != (uint64_t)n_columns || of != STRUCT) {
			reader->bad = 1;
			return;
		}
		for (; n_found < n_columns && !reader->bad; n_found++)
			read_chunk(reader, chunks + 4 * n_found);
	}
	reader->bad |= n_found != n_columns;
}

int64_t read_column_chunks(const uint8_t *footer, int64_t n_bytes, int64_t n_groups, int64_t n_columns, int64_t *chunks)
{
	Reader reader = {footer, n_bytes, 0, 0};
	int64_t field = 0, n_found = 0;
	int kind, of;

	for (int64_t i = 0; i < 4 * n_groups * n_columns; i++)
		chunks[i] = -1;
	while (!reader.bad && (kind = next_field(&reader, &field)) != STOP) {
		if (field != 4 || kind != LIST) {
			skip(&reader, kind, 0, 0);
			continue;
		}
		if (n_found || list_size(&reader, &of) != (uint64_t)n_groups || (n_groups && of != STRUCT))
			return -1;
		for (; n_found < n_groups && !reader.bad; n_found++)
			read_group(&reader, n_columns, chunks + 4 * n_columns * n_found);
	}
	return reader.bad || n_found != n_groups ? -1 : 0;
}
