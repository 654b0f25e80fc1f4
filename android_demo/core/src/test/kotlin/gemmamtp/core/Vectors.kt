package gemmamtp.core

import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.io.File

/** The repository's root: the system property `repository`, else the nearest folder above that has tests/vectors. */
internal val repository: File by lazy {
    System.getProperty("repository")?.let(::File)
        ?: generateSequence(File("").absoluteFile) { it.parentFile }.first { File(it, "tests/vectors").isDirectory }
}

/** A file of tests/vectors, the test vectors of all languages; the system property `vectors` names another folder. */
internal fun vectors(name: String): JsonObject {
    val folder = System.getProperty("vectors")?.let(::File) ?: File(repository, "tests/vectors")
    return JsonParser.parseString(File(folder, name).readText()).asJsonObject
}

internal fun JsonObject.rows(name: String): List<JsonObject> = getAsJsonArray(name).map(JsonElement::getAsJsonObject)
internal fun JsonObject.string(name: String): String = get(name).asString
internal fun JsonObject.ints(name: String): List<Int> = getAsJsonArray(name).map(JsonElement::getAsInt)
internal fun JsonObject.texts(name: String): List<String> = getAsJsonArray(name).map(JsonElement::getAsString)
