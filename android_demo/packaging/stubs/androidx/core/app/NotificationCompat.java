package androidx.core.app;

import android.app.Notification;
import android.content.Context;

public class NotificationCompat {
    public static class Builder {
        public Builder(Context context, String channelId) {}

        public native Builder setSmallIcon(int icon);

        public native Builder setContentTitle(CharSequence title);

        public native Builder setProgress(int max, int progress, boolean indeterminate);

        public native Builder setOngoing(boolean ongoing);

        public native Notification build();
    }
}
